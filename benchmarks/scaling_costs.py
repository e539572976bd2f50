"""How the costs of an engine grow with slices, prompt, context, rows and processes: measured, and fitted, with residuals.

python benchmarks/scaling_costs.py BUNDLE benchmarks/results/scaling-costs-NAME.json [--rounds 3] [--longest 4096]

In every round all points are measured in another order, so that a box that gets slower spoils no single one. The fits are
least squares of relative errors, with no negative terms:

    slices   seconds = a + b * slices
    prompt   seconds = a + b * tokens + c * tokens * (tokens / 2)
    step     seconds = a + b * rows + c * rows * context

What a server adds is seen by one client of it, for a minute or two. `scaling_simulation.py` reads the result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from full_size import _cpu
from load import ours, run

from mcv_runtime import Engine, Event, Options, Request, load

SLICES = (1, 2, 4, 9)
PROMPTS = (32, 128, 512, 1024, 2048, 4096)
ROWS = (1, 2, 4, 8, 16)
CONTEXTS = (64, 512, 2048)
STEPS = 24
ONE_PROCESS = """
import sys, time
import numpy as np
from mcv_runtime import load
with load(sys.argv[1], threads=int(sys.argv[2]), reuse=False) as engine:
    engine.encode_image(np.zeros((64, 64, 3), np.uint8), max_slice_nums=1)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    for number in range(int(sys.argv[3])):
        engine.encode_image(np.full((64, 64, 3), number, np.uint8), max_slice_nums=1)
    print(time.perf_counter() - start, flush=True)
"""


class Prompts:
    """Texts of so many tokens, no two of which begin alike."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._number = engine, 0
        self.word = Counter(self._ids("word " * 64)).most_common(1)[0][0]
        """A token that has text."""

    def _ids(self, text: str) -> list[int]:
        return self._engine.prompt([{"role": "user", "content": text}]).ids.tolist()

    def _tokens(self, text: str) -> int:
        return len(self._ids(text))

    def of(self, tokens: int) -> str:
        self._number += 1
        # What follows the first word is never reached by a prompt that is remembered.
        text = f"{self._number} "
        words = max(tokens - self._tokens(text), 0)
        rate = (self._tokens(text + "word " * 64) - self._tokens(text)) / 64
        return text + "word " * round(words / rate)


def slices(engine: Engine, count: int) -> dict[str, float]:
    """A picture that is cut into about as many."""
    side = engine.bundle.manifest.image.scale_resolution
    across = {1: (1, 1), 2: (2, 1), 4: (2, 2), 9: (3, 3)}[count]
    pixels = np.random.default_rng(random.randrange(1 << 30)).integers(
        0, 256, (across[1] * side, across[0] * side, 3), np.uint8
    )
    encoded: list[int] = []

    def note(event: Event) -> None:
        if event.stage == "slices":
            encoded.append(event.total)

    answer = engine.ask(pixels, "What?", max_new_tokens=1, max_slice_nums=count, progress=note)
    return {"slices": encoded[-1], "seconds": answer.timings.vision}


def prompt(engine: Engine, prompts: Prompts, tokens: int) -> dict[str, float]:
    """A prompt that nothing is remembered of."""
    answer = engine.ask(None, prompts.of(tokens), max_new_tokens=1)
    return {"tokens": len(answer.prompt_tokens) - answer.reused_tokens, "seconds": answer.timings.prefill}


def step(engine: Engine, prompts: Prompts, rows: int, context: int) -> dict[str, float]:
    """A token of each of so many rows, all of which run: between the tokens of the one that began last."""
    # One word over and over: random weights might say nothing that has text, and end at any time.
    said = {prompts.word: 1e4}
    # As long as the others need to begin, but no longer: a row takes memory for all that it may say.
    endless = Options(max_new_tokens=2 * STEPS + 16 * rows, repetition_penalty=1.0, logit_bias=said)
    others = [engine.submit(Request(None, prompts.of(context), options=endless)) for _ in range(rows - 1)]
    for ticket in others:  # all of them have begun
        next(iter(ticket))
    times: list[float] = []

    def note(event: Event) -> None:
        if event.stage == "answer":
            times.append(time.perf_counter())

    last = Options(max_new_tokens=STEPS, repetition_penalty=1.0, logit_bias=said, progress=note)
    answer = engine.submit(Request(None, prompts.of(context), options=last)).result()
    assert not any(ticket.done for ticket in others), "the others ended before they were measured"
    for ticket in others:
        ticket.cancel()
        ticket.result()
    length = len(answer.prompt_tokens) + STEPS / 2
    return {"rows": rows, "context": length, "seconds": statistics.median(np.diff(times).tolist())}


def processes(bundle: Path, count: int, threads: int, slices_each: int) -> float:
    """Slices a second of so many processes."""
    command = [sys.executable, "-c", ONE_PROCESS, str(bundle), str(threads), str(slices_each)]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for one in running:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in running:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    seconds = [float(one.communicate()[0]) for one in running]
    return count * slices_each / max(seconds)


def fit(points: Sequence[dict[str, float]], terms: Sequence[Callable[[dict[str, float]], float]]) -> dict[str, Any]:
    """The terms' factors, none of them negative, and how far the fit is from the medians of the points."""
    rows = np.array([[term(point) for term in terms] for point in points])
    seconds = np.array([point["seconds"] for point in points])
    used = list(range(len(terms)))
    while True:
        found = np.linalg.lstsq(rows[:, used] / seconds[:, None], np.ones(len(points)), rcond=None)[0]
        if (found >= 0).all() or len(used) == 1:
            break
        used.remove(used[int(np.argmin(found))])
    factors = np.zeros(len(terms))
    factors[used] = found
    errors = rows @ factors / seconds - 1
    return {"factors": [float(f"{one:.4g}") for one in factors], "relative_residuals": [round(float(one), 3) for one in errors]}


def median_points(points: Sequence[dict[str, float]], key: Callable[[dict[str, float]], object]) -> list[dict[str, float]]:
    """Of what was measured several times, the median."""
    groups = defaultdict(list)
    for point in points:
        groups[key(point)].append(point)
    return [
        {name: round(statistics.median(one[name] for one in group), 5) for name in group[0]}
        | {"spread": round(max(one["seconds"] for one in group) / min(one["seconds"] for one in group), 2)}
        for group in groups.values()
    ]


def measure(bundle: Path, threads: int, rounds: int, longest: int) -> dict[str, Any]:
    """All points and fits of one bundle."""
    found: dict[str, list[dict[str, float]]] = {"slices": [], "prompt": [], "step": []}
    with load(bundle, threads=threads, reuse=False) as engine:
        prompts = Prompts(engine)
        engine.warm_up()
        slices(engine, 1)
        cases = [("slices", partial(slices, engine, count)) for count in SLICES]
        cases += [("prompt", partial(prompt, engine, prompts, tokens)) for tokens in PROMPTS if tokens <= longest]
        cases += [("step", partial(step, engine, prompts, rows, CONTEXTS[0])) for rows in ROWS]
        cases += [("step", partial(step, engine, prompts, 1, context)) for context in CONTEXTS[1:] if context <= longest]
        for number in range(rounds):
            random.Random(number).shuffle(cases)
            for name, case in cases:
                found[name].append(case())
                print(name, found[name][-1], file=sys.stderr)
    points = {
        "slices": median_points(found["slices"], lambda one: one["slices"]),
        "prompt": median_points(found["prompt"], lambda one: round(np.log2(one["tokens"]))),
        "step": median_points(found["step"], lambda one: (one["rows"], round(np.log2(one["context"])))),
    }
    return {
        "points": points,
        "fits": {
            "slices": fit(points["slices"], [lambda one: 1, lambda one: one["slices"]]),
            "prompt": fit(points["prompt"], [lambda one: 1, lambda one: one["tokens"], lambda one: one["tokens"] ** 2 / 2]),
            "step": fit(points["step"], [lambda one: 1, lambda one: one["rows"], lambda one: one["rows"] * one["context"]]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=PROMPTS[-1], help="Tokens of the longest prompt.")
    parser.add_argument("--slices-each", type=int, default=8, help="Slices of a process, where several are compared.")
    parser.add_argument("--minutes", type=float, default=2.0, help="Of the one client that asks a server.")
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    given = parser.parse_args()
    result = {
        "bundle": given.bundle.name,
        "size_mb": round(sum(one.stat().st_size for one in (given.bundle / "onnx").iterdir()) / 1e6, 1),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": given.threads, "note": given.note},
        **measure(given.bundle, given.threads, given.rounds, given.longest),
        "served": run(partial(ours, bundle=given.bundle, threads=given.threads), 1, given.minutes, 48)[1],
        "slices_per_s": {
            f"{count} x {given.threads // count} threads": round(
                statistics.median(
                    processes(given.bundle, count, given.threads // count, given.slices_each) for _ in range(given.rounds)
                ),
                3,
            )
            for count in (1, given.threads)
        },
    }
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
