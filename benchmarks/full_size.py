"""Build a full-size checkpoint and ask the bundle about a picture, each in a process of its own; write what it took as JSON.

python benchmarks/full_size.py CHECKPOINT BUNDLE benchmarks/results/NAME.json --note "two cores, shared" --precision q4

What it does not know are options of the build. Nothing that an earlier calibration has measured is used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

EXPORT = [sys.executable, "-c", "from mcv_export.cli import main; main()"]
RUN = [sys.executable, "-c", "from mcv_runtime.command.cli import main; main()"]


def report(command: list[str], **environment: str) -> dict[str, Any]:
    """The JSON object that a command prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    arguments, options = parser.parse_known_args()
    build = [*EXPORT, "build", str(arguments.checkpoint), str(arguments.bundle), *options, "--force", "--json"]
    with tempfile.TemporaryDirectory() as cache:
        built = report(build, MCV_CACHE=cache)
    picture = arguments.bundle / "picture.png"
    Image.effect_mandelbrot((896, 896), (-2.5, -1.5, 1.0, 1.5), 100).convert("RGB").save(picture)
    asked = [*RUN, "-m", str(arguments.bundle), "-t", arguments.threads, "-n", "33", "--json"]
    with_picture = report([*asked, "--image", str(picture), "-p", "What is this?"])
    text_only = report([*asked, "-p", "Tell me more. " * 100])
    picture.unlink()
    slices = sum(len(image["slice_sizes"]) for image in with_picture["images"])
    times, text_times = with_picture["timings_s"], text_only["timings_s"]
    result = {
        "checkpoint": json.loads((arguments.checkpoint / "config.json").read_text())["architectures"][0],
        "weights": "random",
        "options": options,
        "quantization": json.loads((arguments.bundle / "mcv.json").read_text(encoding="utf-8"))["quantization"],
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": int(arguments.threads), "note": arguments.note},
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "torch", "minicpmv-onnx")},
        "build": {
            "seconds": round(built["seconds"], 1),
            "peak_rss_mb": round(built["peak_rss_mb"]),
            "size_mb": round(sum(graph["size"] for graph in built["graphs"]) / 1e6, 1),
            "graphs_mb": {graph["name"]: round(graph["size"] / 1e6, 1) for graph in built["graphs"]},
        },
        "run": {
            "load_s": times["load"],
            "slices": slices,
            "s_per_slice": round(times["vision"] / slices, 3),
            "picture_prompt_tokens": len(with_picture["prompt_tokens"]),
            "picture_prefill_tokens_per_s": round(len(with_picture["prompt_tokens"]) / times["prefill"], 1),
            "text_prompt_tokens": len(text_only["prompt_tokens"]),
            "text_prefill_tokens_per_s": round(len(text_only["prompt_tokens"]) / text_times["prefill"], 1),
            "decode_tokens_per_s": text_only["tokens_per_s"],
            "peak_rss_mb": with_picture["peak_rss_mb"],
        },
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def _cpu() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
