"""Seconds a slice of a full-size vision tower in every precision, in one interleaved run, against fp32 and the machine's GEMM.

    python benchmarks/random_checkpoint.py minicpmv4_0 /data/random-4.0
    python benchmarks/tower.py /data/random-4.0 benchmarks/results/tower-minicpmv4_0.json

One slice of 448 x 448 pixels (1,024 patches), in each round of another drawn picture that calibrated nothing. The ceiling is
the time that the tower's products would take at the speed of one large 8-bit product, its attention at that of a float one;
nothing else is counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from full_size import _cpu
from peers.limits import machine_limits
from PIL import Image
from torch import nn

from mcv_calibration.drawn import draw
from mcv_calibration.measured import NOTHING
from mcv_calibration.precisions import Precision
from mcv_calibration.recipe import GraphRecipe, Recipe
from mcv_export.calibrate import SampleOptions, calibrate
from mcv_export.checkpoint import open_checkpoint
from mcv_export.families import recognise
from mcv_export.graph_files import storage_of, write_graph
from mcv_export.workers import workers
from mcv_graphs.layers import Linear
from mcv_runtime.bundle.manifest import GraphName, GraphSpec
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.sessions.graphs import Session, cpu_session, session_options
from mcv_runtime.vision.tower import Tower

PATCHES = 1024
SEED = 3
"""Of the drawn pictures: others than those that calibrate."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "q8", "int8-dynamic", "int8-static", "int8-token")


def operation_counts(tower: nn.Module, rows: int) -> tuple[float, float]:
    """Multiplications and additions of the linear layers and of attention, for so many patches."""
    merge_after = getattr(tower, "merge_after", None)
    linear = attention = 0.0
    for path, layer in tower.named_modules():
        if not isinstance(layer, Linear) or not layer.quantizable:
            continue
        number = int(path.split(".")[1]) if path.startswith("layers.") else 0
        merged = merge_after is not None and (number > merge_after or path.startswith("vit_merger.linear"))
        here = rows // 4 if merged else rows
        linear += 2 * here * layer.in_features * layer.out_features
        if path.startswith("layers.") and path.endswith("q_proj"):
            attention += 4 * here**2 * layer.out_features
    return linear, attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = open_checkpoint(arguments.checkpoint)
    plan = recognise(checkpoint.config).plan(checkpoint)
    graph = plan.graphs[0]
    drawn = [
        Image.open(io.BytesIO(draw(number, SEED))).convert("RGB").resize((448, 448)) for number in range(arguments.rounds + 1)
    ]
    pictures = [slice_picture(np.asarray(picture), plan.image, max_slice_nums=1) for picture in drawn]
    times: dict[Precision, list[float]] = {precision: [] for precision in PRECISIONS}
    sizes: dict[Precision, float] = {}
    hidden: dict[Precision, list[np.ndarray]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.parent) as name:
        towers: dict[Precision, Tower] = {}
        for precision in PRECISIONS:
            others = {other.name: GraphRecipe(precision="fp32") for other in plan.graphs[1:]}
            recipe = Recipe(graphs={**others, graph.name: GraphRecipe(precision=precision)})
            samples = SampleOptions(count=arguments.samples, store=Path(name) / "store")
            found = calibrate(plan, checkpoint, recipe, samples, lambda what, done, total: print(what, done, total))
            storage = storage_of(graph, recipe.graphs[graph.name], recipe.target, found.graphs.get(graph.name, NOTHING))
            path = Path(name) / f"{precision}.onnx"
            with workers() as pool:
                data = write_graph(graph, storage, checkpoint, path, lambda *_: None, pool)
            sizes[precision] = data.path.stat().st_size / 1e6
            session = cpu_session(path, session_options(arguments.threads))
            spec = GraphSpec(file=path.name, precision=precision, inputs=graph.io.all_inputs, outputs=graph.io.all_outputs)

            def sessions(name: GraphName, session: Session = session) -> Session:
                return session

            specs = {
                other.name: spec if other is graph else GraphSpec(file="", precision="", inputs={}, outputs={})
                for other in plan.graphs
            }
            towers[precision] = Tower(sessions, plan.manifest(family="", model="", graphs=specs))
        for number, picture in enumerate(pictures):
            for precision, tower in towers.items():
                start = time.perf_counter()
                made = tower.look(picture.slices[:1], picture.downsample_mode, 0)["vision_hidden"]
                if number:  # the first round warms up
                    times[precision].append(time.perf_counter() - start)
                hidden[precision].append(np.array(made).ravel())
    limits = machine_limits(arguments.threads)
    linear, attention = operation_counts(graph.module(), PATCHES)
    ceiling = linear / limits["int8_gops"] / 1e9 + attention / limits["fp32_gops"] / 1e9
    medians = {precision: statistics.median(values) for precision, values in times.items()}
    flat = {precision: np.concatenate(found) for precision, found in hidden.items()}
    reference = flat["fp32"]
    result = {
        "tower": f"{graph.name} of {arguments.checkpoint.name}, random weights",
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": arguments.threads, "note": arguments.note},
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "torch", "minicpmv-onnx")},
        "limits": limits,
        "ceiling_s": round(ceiling, 3),
        "precisions": {
            precision: {
                "s_per_slice": round(median, 3),
                "times_fp32": round(medians["fp32"] / median, 2),
                "of_ceiling": round(ceiling / median, 3),
                "size_mb": round(sizes[precision], 1),
                "relative_error": round(float(np.linalg.norm(flat[precision] - reference) / np.linalg.norm(reference)), 4),
            }
            for precision, median in medians.items()
        },
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
