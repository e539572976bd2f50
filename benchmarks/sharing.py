"""What requests that share an engine are spared, on a full-size bundle with random weights.

python benchmarks/sharing.py BUNDLE benchmarks/results/sharing-NAME.json [--before FOLDER_OF_ANOTHER_VERSION]

Measured in one process: the longest gap between two tokens of a running request while a picture of nine slices and a prompt of
4,096 tokens are read, beside the time of one slice alone; tokens a second of 1 to 16 rows while all of them run; and the bytes
that joining and leaving copy. `--before`: another checkout's `runtime` folder; decoding and reading of one request by
both versions, in processes of their own that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from full_size import _cpu
from scaling_costs import ROWS, Prompts, step

PROMPT = "Tell me more. " * 100
TOKENS = 24
ROUNDS = 3
SINGLE = """
import json, sys, time
from mcv_runtime import load
engine = load(sys.argv[1], threads=int(sys.argv[2]))
engine.ask(None, "Hi", max_new_tokens=4)
found = []
for number in range(2):
    answer = engine.ask(None, f"{number} " + sys.argv[3], max_new_tokens=int(sys.argv[4]), repetition_penalty=1.0)
    read = len(answer.prompt_tokens) - answer.reused_tokens
    found.append([read / answer.timings.prefill, answer.tokens_per_s])
print(json.dumps(found))
"""


def single(bundle: Path, runtime: Path, threads: int) -> list[list[float]]:
    """Tokens a second, read and made, of one request at a time."""
    command = [sys.executable, "-c", SINGLE, str(bundle), str(threads), PROMPT, str(TOKENS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(runtime)})
    found: list[list[float]] = json.loads(done.stdout)
    return found


def compared(bundle: Path, before: tuple[Path, Path], threads: int) -> dict[str, Any]:
    """Both versions in turns; medians and ratios."""
    here = Path(__file__).parents[1] / "runtime"
    pairs = [(single(bundle, here, threads), single(*before, threads)) for _ in range(ROUNDS)]
    result: dict[str, Any] = {}
    for place, name in ((0, "prefill"), (1, "decode")):
        now, then = ([statistics.median(one[place] for one in run) for run in runs] for runs in zip(*pairs, strict=True))
        ratios = [mine / other for mine, other in zip(now, then, strict=True)]
        result[name] = {
            "tokens_per_s": [round(value, 2) for value in now],
            "before": [round(value, 2) for value in then],
            "ratio": round(statistics.median(ratios), 3),
        }
    return result


def shared(bundle: Path, threads: int) -> dict[str, Any]:
    """Gaps, throughput and copies in one engine."""
    from mcv_runtime import Event, Options, Request, Ticket, load

    engine = load(bundle, threads=threads)
    side = engine.bundle.manifest.image.scale_resolution
    pixels = np.random.default_rng(0).integers(0, 256, (3 * side, 3 * side, 3), np.uint8)
    alone = [
        engine.ask(pixels[row : row + side, column : column + side], "What?", max_new_tokens=2, max_slice_nums=1).timings.vision
        for row in (0, side)
        for column in (0, side)
    ]
    slice_s = statistics.median(alone[1:])  # the first one warms up
    tokens_a_word = len(engine.ask(None, "word " * 1000, max_new_tokens=1).prompt_tokens) / 1000
    question = "word " * round(4096 / tokens_a_word)
    gaps, last, long = [], 0.0, Request(pixels, question, options=Options(max_new_tokens=2, max_slice_nums=9))
    read: list[Ticket] = []

    def note(event: Event) -> None:
        """After every token: the first one hands in the long request, the last one is when that is answered."""
        nonlocal last
        if event.stage != "answer":
            return
        now = time.perf_counter()
        if read:
            gaps.append(now - last)
            if read[0].done:
                running.cancel()
        else:
            read.append(engine.submit(long))
        last = time.perf_counter()

    options = Options(max_new_tokens=2000, repetition_penalty=1.0, stop_token_ids=[], progress=note)
    running = engine.submit(Request(None, "Count to a thousand.", options=options))
    running.result()
    answer = read[0].result()
    together = {}
    prompts = Prompts(engine)
    for rows in ROWS:
        before = engine._scheduler.slots.copied
        together[rows] = {
            "tokens_per_s": round(rows / step(engine, prompts, rows, 64)["seconds"], 2),
            "megabytes_copied": round((engine._scheduler.slots.copied - before) / 1e6, 1),
        }
    return {
        "slice_s": round(slice_s, 3),
        "slices_alone_s": [round(seconds, 3) for seconds in alone],
        "longest_gap_s": round(max(gaps), 3),
        "longest_gap_over_slice": round(max(gaps) / slice_s, 2),
        "tokens_meanwhile": len(gaps),
        "reading_s": round(answer.timings.vision + answer.timings.prefill, 1),
        "prompt_tokens": len(answer.prompt_tokens),
        "together": together,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--before", type=Path, nargs=2, metavar=("RUNTIME", "BUNDLE"), help="Of the other version.")
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    wanted = parser.parse_args()
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": wanted.threads, "note": wanted.note}
    result: dict[str, Any] = {"machine": machine, **shared(wanted.bundle, wanted.threads)}
    if wanted.before is not None:
        result["one_request"] = compared(wanted.bundle, (wanted.before[1], wanted.before[0]), wanted.threads)
    wanted.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
