"""What a second turn, a second question and a batch cost against the first turn and one by one, on any bundle, in one run.

    python benchmarks/conversation.py BUNDLE benchmarks/results/NAME.json --note "two cores, shared"

Time to first token: from the question to the first token of the answer, pictures cut, encoded and read. Turns of both kinds are
interleaved, medians are given; every first turn shows a picture that was not seen before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mcv_runtime import Answer, Chat, Event, Options, Request, load

TOKENS = 16


def first_token_s(ask: Callable[..., Answer]) -> float:
    """Seconds until the first token is there; the rest of the answer is made too."""
    start, first = time.perf_counter(), list[float]()

    def note(event: Event) -> None:
        if event.stage == "answer" and not first:
            first.append(time.perf_counter() - start)

    ask(progress=note)
    return first[0]


def pictures(side: int) -> Iterator[Image.Image]:
    """Ever new ones."""
    random = np.random.default_rng(0)
    while True:
        small = random.integers(0, 255, (side // 16, side // 16, 3), np.uint8)
        yield Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--side", type=int, default=896, help="Of the pictures, in pixels.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    arguments = parser.parse_args()
    engine = load(arguments.bundle, threads=arguments.threads)
    drawn = pictures(arguments.side)
    engine.ask(next(drawn), "What is this?", max_new_tokens=2)  # warm up
    first, second, again, vision = [], [], [], []
    for _ in range(arguments.rounds):
        picture = next(drawn)
        chat: Chat = engine.chat(max_new_tokens=TOKENS)
        first.append(first_token_s(partial(chat.ask, picture, "What is in the picture?")))
        second.append(first_token_s(partial(chat.ask, None, "And what colour is it?")))
        asked = engine.ask(picture, "Is there any text?", max_new_tokens=TOKENS)
        again.append(asked.timings.preprocess + asked.timings.vision + asked.timings.prefill)
        vision.append(asked.timings.vision)
    shown = next(drawn)
    requests = [
        Request(shown, "Tell me more. " * (1 + number), options=Options(max_new_tokens=TOKENS + 4 * number))
        for number in range(arguments.batch)
    ]
    for request in requests:  # all prompts are known afterwards: what is compared is the decoding
        engine.ask(request.images, request.prompt, max_new_tokens=1)
    start = time.perf_counter()
    alone = [engine.ask(request.images, request.prompt, **request.options) for request in requests]
    middle = time.perf_counter()
    together = engine.batch(requests)
    end = time.perf_counter()
    tokens = sum(len(answer.tokens) for answer in alone)
    medians = {name: statistics.median(times) for name, times in (("first", first), ("second", second), ("again", again))}
    result = {
        "bundle": engine.bundle.manifest.model,
        "precision": {name: graph.precision for name, graph in engine.bundle.manifest.graphs.items()},
        "machine": {"cores": os.cpu_count(), "threads": arguments.threads, "note": arguments.note},
        "rounds": arguments.rounds,
        "first_turn_s": round(medians["first"], 3),
        "second_turn_s": round(medians["second"], 3),
        "second_over_first": round(medians["second"] / medians["first"], 4),
        "same_picture_new_question_s": round(medians["again"], 3),
        "same_picture_vision_s": round(statistics.median(vision), 4),
        "batch": {
            "requests": arguments.batch,
            "one_by_one_tokens_per_s": round(tokens / (middle - start), 1),
            "together_tokens_per_s": round(tokens / (end - middle), 1),
            "speedup": round((middle - start) / (end - middle), 2),
            "tokens_equal": [answer.tokens for answer in alone] == [answer.tokens for answer in together],
        },
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
