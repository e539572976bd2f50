"""One graph of a bundle: the `.onnx` file and the file of its weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from mcv_calibration.formats import layer_formats
from mcv_calibration.measured import NOTHING, Measured
from mcv_calibration.recipe import GraphRecipe
from mcv_calibration.target import Target
from mcv_export.checkpoint import Checkpoint
from mcv_export.plan import GraphPlan
from mcv_export.sources import resolve
from mcv_export.storage import Storage
from mcv_export.trace import trace
from mcv_export.weights import layout, point, write_weights
from mcv_runtime.errors import OutputError

Progress = Callable[[str, int, int], None]
"""Called with a graph's name, or what of it is measured; what is done; and what there is in all."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of weights, and where each begins."""

    path: Path
    offsets: Mapping[str, int]


def storage_of(graph: GraphPlan, recipe: GraphRecipe, target: Target, measured: Measured = NOTHING) -> Storage:
    """How a recipe stores a graph."""
    with torch.device("meta"):
        module = graph.module()
    return Storage(formats=layer_formats(module, recipe, target), measured=measured, method=recipe.method)


def write_graph(
    graph: GraphPlan, storage: Storage, checkpoint: Checkpoint, path: Path, progress: Progress, pool: Executor
) -> DataFile:
    """Write a graph to `path` and its weights beside it; the pool's threads share the work on these."""
    sources = resolve(graph, checkpoint, storage)
    model, module = trace(graph, storage)
    total = sum(rows * columns for rows, columns in (source.shape for source in sources.values()))
    done = 0

    def advance(parameters: int) -> None:
        nonlocal done
        done += parameters
        progress(graph.name, done, total)

    progress(graph.name, 0, total)
    needed, free = layout(model, module, storage.twins(graph, module))[1], shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(f"no space left for {path.name}: it needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free")
    file = path.with_name(f"{path.name}.data")
    offsets = write_weights(file, model, module, sources, graph, storage, pool, advance)
    ir.save(model, path)
    return DataFile(file, offsets)


def write_sharing_graph(graph: GraphPlan, storage: Storage, data: DataFile, path: Path) -> None:
    """Write a graph to `path` that reads its weights from another graph's file."""
    model, module = trace(graph, storage)
    needed = layout(model, module, storage.twins(graph, module))[0].keys()
    assert needed <= data.offsets.keys(), f"{graph.name} has weights that {graph.shares} has not"
    point(model, data.path, {name: data.offsets[name] for name in needed})
    ir.save(model, path)
