"""Calibrate a full-size SigLIP so400m tower (random weights, with outlier channels) and write down the memory and time it took.

python benchmarks/calibration_memory.py benchmarks/results/calibration-memory.json --pictures 128

The tower is that of MiniCPM-V 4.0; it is written to a temporary folder (0.9 GB) and measured in a process of its own, on the
built-in pictures, each as one slice, in the two passes of the default recipe. No weight stays in memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import _cpu
from layouts import minicpmv4_0, siglip
from safetensors.torch import save_file

from mcv_calibration.inputs import layer_inputs
from mcv_calibration.measure import measure
from mcv_calibration.recipe import GraphRecipe
from mcv_calibration.samples import Sample, builtin_samples
from mcv_calibration.store import Store
from mcv_export.checkpoint import open_checkpoint
from mcv_export.eager import eager_module
from mcv_export.families.minicpmv4_0 import FAMILY
from mcv_export.memory import peak_rss_mb
from mcv_export.sources import resolve
from mcv_runtime.pictures.patches import patch_slice
from mcv_runtime.pictures.picture import slice_picture

ROOT = Path(__file__).parents[1]
OUTLIERS = 8
"""Channels of each norm that are 30 to 300 times the rest."""


def write_tower(folder: Path) -> None:
    """The vision tensors of a 4.0 checkpoint, with its config and tokenizer."""
    vision = minicpmv4_0.CONFIG["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    shapes = siglip("vpm", *(vision[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size")), side)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes:
        if len(shape) > 1:
            value = torch.empty(shape).normal_(0, (torch.Size(shape).numel() // shape[0]) ** -0.5, generator=generator)
        else:
            value = torch.full(shape, float("norm" in name and name.endswith("weight")))
            if "norm" in name and name.endswith("weight"):
                value[torch.randperm(shape[0], generator=generator)[:OUTLIERS]] = torch.logspace(1.5, 2.5, OUTLIERS)
        tensors[name] = value.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(minicpmv4_0.CONFIG), encoding="utf-8")
    for path in (ROOT / minicpmv4_0.TOKENIZER).glob("*token*"):
        shutil.copyfile(path, folder / path.name)


def calibrate(folder: Path, pictures: int, threads: int) -> dict[str, Any]:
    """What calibrating the tower took, in this process."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(folder)
    model = FAMILY.plan(checkpoint)
    plan = model.graphs[0]
    module = eager_module(plan, checkpoint, resident=0)
    sources = resolve(plan, checkpoint)

    def run(sample: Sample) -> None:
        picture = slice_picture(sample.images[0], model.image, max_slice_nums=1)
        patches = patch_slice(picture.slices[0], model.image)
        module(torch.from_numpy(patches.pixel_values[None]), torch.from_numpy(patches.position_ids[None]))

    inputs = layer_inputs(module)
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def progress(label: str, done: int, count: int) -> None:
        seconds[label] = round(time.perf_counter() - start - sum(s for name, s in seconds.items() if name != label), 1)
        print(f"{label}: {done} of {count}, {seconds[label]} s, {peak_rss_mb():.0f} MB", file=sys.stderr, flush=True)

    before = peak_rss_mb()
    found = measure(
        module,
        run,
        builtin_samples(pictures),
        GraphRecipe(precision="int8-static"),
        inputs,
        lambda path: sources[f"{path}.weight"].pieces(),
        Store("benchmark", folder / "store"),
        progress,
    )
    return {
        "tensors": len(inputs),
        "layers": len(found.ranges),
        "smoothed_layers": len(found.smoothing),
        "rss_before_mb": round(before),
        "peak_rss_mb": round(peak_rss_mb()),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    parser.add_argument("--tower", type=Path, help=argparse.SUPPRESS)  # set for the processes that write and measure it
    arguments = parser.parse_args()
    if arguments.tower and not any(arguments.tower.iterdir()):
        write_tower(arguments.tower)
        return
    if arguments.tower:
        print(json.dumps(calibrate(arguments.tower, arguments.pictures, arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--tower", folder]
        subprocess.run(command, check=True)  # not here: a process starts with its parent's peak memory on its account
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    result = {
        "tower": "SigLIP so400m/14, 27 layers, random weights",
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": arguments.threads, "note": arguments.note},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "minicpmv-onnx")},
        "pictures": arguments.pictures,
        **measured,
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
