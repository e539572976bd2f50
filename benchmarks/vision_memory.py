"""Peak memory and time of encoding 36 slices and 128 frames, one by one and all in one batch, each in a process of its own.

    python benchmarks/vision_memory.py BUNDLE benchmarks/results/vision-memory.json

Low-memory sessions: the decoder is not open. A frame is one slice.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from full_size import _cpu

from mcv_export.memory import peak_rss_mb
from mcv_runtime import Video, load

CASES = {"36 slices": 36, "128 frames": 128}


def encode(bundle: Path, case: str, batch: int, threads: int) -> None:
    """One case, in this process; prints what it took."""
    engine = load(bundle, threads=threads, low_memory=True, batch_slices=batch, memory_mb=1e6)
    random = np.random.default_rng(0)
    side = engine.bundle.manifest.image.scale_resolution
    before, start = peak_rss_mb(), time.perf_counter()
    if case == "36 slices":
        picture = random.integers(0, 256, (6 * side, 6 * side, 3), np.uint8)
        count = len(engine.encode_image(picture, max_slice_nums=CASES[case]).grid.sizes)
    else:
        frames = [random.integers(0, 256, (side, side, 3), np.uint8) for _ in range(CASES[case])]
        count = len(engine.encode_video(Video(frames, fps=1), max_num_frames=CASES[case]).frames)
    seconds = time.perf_counter() - start
    print(json.dumps({"slices": count, "before_mb": before, "peak_rss_mb": peak_rss_mb(), "s_per_slice": seconds / count}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # set for the processes that encode
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        encode(arguments.bundle, arguments.case, arguments.batch, arguments.threads)
        return
    cases = {}
    for case, count in CASES.items():
        figures = {}
        for name, batch in (("one by one", 1), ("one batch", count)):
            command = [sys.executable, *sys.argv, "--case", case, "--batch", str(batch)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[name] = {key: round(value, 3) for key, value in json.loads(done.stdout).items()}
        peaks = [figures[name]["peak_rss_mb"] for name in ("one batch", "one by one")]
        cases[case] = {**figures, "one_batch_over_one_by_one": round(peaks[0] / peaks[1], 2)}
    result = {
        "bundle": arguments.bundle.name,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": arguments.threads, "note": arguments.note},
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "minicpmv-onnx")},
        "cases": cases,
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
