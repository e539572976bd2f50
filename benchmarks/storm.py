"""Requests of all kinds come and go on one engine, from threads and coroutines, and each is answered as if it were alone.

python benchmarks/storm.py BUNDLE --rounds 1000 --out results/storm.json

A round is 40 requests (greedy, sampled, beams, prompt lookup, constrained, several answers, conversations, videos, cancelled
and late ones) in an order drawn from its seed, taken by 8 threads, of which some use asyncio. The bundle is one in fp32: how
rows are grouped changes the last digits of logits, which 8 bits enlarge by a rounding of activations, and between two tokens
that are about equally likely (a constraint may leave none but unlikely ones) that decides.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mcv_runtime import Answer, Engine, Options, Request, Video, load

DEMO = Path(__file__).parents[1] / "models" / "tiny" / "demo.png"
QUESTIONS = ["What does the text say?", "Describe the picture.", "How many shapes are there?", "a b c a b c a b"]
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"num_beams": 3},
    {"prompt_lookup": True},
    {"regex": "[A-Z]{2,5}"},
    {"temperature": 1.0, "seed": 5, "num_return_sequences": 3},
    {"num_beams": 3, "num_return_sequences": 2, "logprobs": True},
    {"stop": ["e", "o"]},
]
THREADS = 8
MEMORY_MB = 64
CASES = 40


def cases() -> list[tuple[str, Any, str, dict[str, Any]]]:
    """How it is asked, pictures, question and options of every request."""
    drawn = np.random.default_rng(0)
    shown = [np.asarray(drawn.integers(0, 255, size, np.uint8)) for size in ((300, 500, 3), (64, 64, 3))]
    pictures: list[Any] = [None, DEMO, shown[0], [DEMO, shown[1]], Video([shown[1], DEMO, shown[1]], fps=1)]
    ways = ["ask", "stream", "await", "submit", "chat", "cancel", "late", "async for"]
    made = []
    for number in range(CASES):
        options = {**KINDS[number % len(KINDS)], "max_new_tokens": 4 + 7 * number % 13}
        made.append((ways[number // 5], pictures[number % len(pictures)], QUESTIONS[number // 2 % len(QUESTIONS)], options))
    return made


def tokens(answer: Answer) -> list[tuple[int, ...]]:
    """Of all completions."""
    return [answer.tokens, *(other.tokens for other in answer.alternatives)]


def ask(engine: Engine, way: str, pictures: Any, question: str, options: dict[str, Any]) -> list[Answer]:
    """Ask in one of many ways; what each is expected to be is what `ask` gives alone."""
    request = Request(pictures, question, options=Options(**options))
    if way == "stream":
        ticket = engine.stream(pictures, question, **options)
        text = "".join(ticket)
        answer = ticket.result()
        assert text == answer.text, (text, answer.text)
        return [answer]
    if way == "submit":
        return [engine.submit(request).result()]
    if way == "await":
        return [asyncio.run(_awaited(engine, request))]
    if way == "async for":
        return [asyncio.run(_streamed(engine, request))]
    if way == "chat":
        chat = engine.chat(**options)
        return [chat.ask(pictures, question), chat.ask(None, QUESTIONS[1])]
    if way == "cancel":
        cancel = threading.Event()
        told = lambda event: cancel.set() if event.stage == "answer" and event.done >= 2 else None  # noqa: E731
        return [engine.ask(pictures, question, cancel=cancel, progress=told, **options)]
    if way == "late":
        return [engine.ask(pictures, question, timeout=1e-9, **options)]
    return [engine.ask(pictures, question, **options)]


async def _awaited(engine: Engine, request: Request) -> Answer:
    return await engine.submit(request)


async def _streamed(engine: Engine, request: Request) -> Answer:
    ticket = engine.submit(request)
    async for _ in ticket:
        pass
    return ticket.result()


def storm(bundle: Path, rounds: int, first_seed: int, note: Callable[[int], object] = lambda seed: None) -> dict[str, Any]:
    """Run rounds, and count what was wrong."""
    asked = cases()
    alone = load(bundle, threads=1, reuse=False)
    wanted = [[tokens(answer) for answer in ask(alone, "chat" if way == "chat" else "ask", *rest)] for way, *rest in asked]
    engine = load(bundle, threads=1, memory_mb=MEMORY_MB)
    counts: collections.Counter[str] = collections.Counter()
    wrong: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    for seed in range(first_seed, first_seed + rounds):
        order = list(range(len(asked)))
        random.Random(seed).shuffle(order)
        left, found = collections.deque(order), dict[int, list[Answer]]()

        def work(left: collections.deque[int] = left, found: dict[int, list[Answer]] = found) -> None:
            while left:
                try:
                    number = left.popleft()
                except IndexError:
                    return
                found[number] = ask(engine, *asked[number])
                use = engine.memory()
                counts["beyond"] += use.running + use.kept + use.pictures > use.limit

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, (way, _, _, options) in enumerate(asked):
            if number not in found:
                counts["missing"] += 1
                continue
            got = [tokens(answer) for answer in found[number]]
            if way in ("cancel", "late"):  # as far as it came: a beginning, but of a search, whose best may change
                pairs = zip(got[0], wanted[number][0], strict=False)
                same = "num_beams" in options or all(mine == all_[: len(mine)] for mine, all_ in pairs)
            else:
                same = got == wanted[number]
            if not same:
                wrong[f"{number} {way} {options}"] += 1
        stuck = engine.memory().running + sum(engine._scheduler.load)
        counts["stuck"] += stuck > 0
        note(seed)
    return {
        "rounds": rounds,
        "requests": rounds * len(asked),
        "wrong": sum(wrong.values()),
        "wrong_by_case": dict(wrong),
        "missing": counts["missing"],
        "stuck_rounds": counts["stuck"],
        "beyond_memory": counts["beyond"],
        "memory_mb": MEMORY_MB,
        "megabytes_copied": round(engine._scheduler.slots.copied / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Run them and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "storm.json")
    wanted = parser.parse_args()
    result = storm(wanted.bundle, wanted.rounds, wanted.seed, lambda seed: print(seed, flush=True) if seed % 50 == 0 else None)
    wanted.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
