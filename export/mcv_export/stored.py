"""A graph's module with the tensors of a bundle's own file, and how far those are from the checkpoint's weights.

What calibration found (ranges, factors, rounded blocks) is in the bundle in the form of its tensors alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mcv_export.checkpoint import Checkpoint
from mcv_export.plan import GraphPlan
from mcv_export.sources import resolve
from mcv_export.storage import feed_forward
from mcv_graphs.formats import FLOAT32, LayerFormat
from mcv_graphs.layers import Embedding, Linear, set_formats
from mcv_runtime.errors import CheckpointError

_SAMPLE_ROWS = 256
"""Output channels of each weight that are compared: other weights differ in all of them."""
_TURNS = 8


def stored_module(plan: GraphPlan, formats: Mapping[str, LayerFormat], file: Path) -> nn.Module:
    """The module in these formats, its tensors read from the graph `file` (they stay on the disk until they are used)."""
    tensors = _tensors(file)
    with torch.device("meta"):
        module = plan.module().eval()
        _resize(module, formats, tensors)
        marked = {path: _as_stored(kind, f"{path}.input_factors" in tensors) for path, kind in formats.items()}
        set_formats(module, marked)
    module.requires_grad_(False)
    for name, empty in [*module.named_parameters(), *module.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        value = tensors.get(name)
        if value is None and owner in plan.tied:  # a float table that serves as both is in the file once, as [rows, width]
            value = tensors[f"{plan.tied[owner]}.{leaf}"].T
        if value is None or value.shape != empty.shape:
            raise CheckpointError(f"{file.name} has no {name} of shape {list(empty.shape)}; build the bundle again")
        child = module.get_submodule(owner)
        setattr(child, leaf, nn.Parameter(value, requires_grad=False) if isinstance(empty, nn.Parameter) else value)
    return module


def check_weights(plan: GraphPlan, checkpoint: Checkpoint, module: nn.Module) -> None:
    """Raise `CheckpointError` for a layer of a stored module whose weight is not a rounded form of the checkpoint's.

    Smoothing is allowed for: a factor for each input or output channel is no error. Pruned layers are left out.
    """
    sources = resolve(plan, checkpoint)
    for path, layer in module.named_modules():
        if not isinstance(layer, Linear | Embedding) or sources[f"{path}.weight"].shape != _shape(layer):
            continue
        count = min(_shape(layer)[0], _SAMPLE_ROWS)
        wanted, found = sources[f"{path}.weight"].rows(0, count), layer.format.dequantize(layer, count).numpy()
        expected = _with_factors(wanted, found)
        error = float(np.sqrt(((found - expected) ** 2).sum() / np.maximum((expected**2).sum(), 1e-30)))
        if error > layer.format.tolerance:
            raise CheckpointError(f"the weight of {path} is another than the checkpoint's (relative error {error:.2g})")


def _with_factors(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float32]:
    """`wanted` with the factor for each row and each column that bring it nearest to `found`: least squares, in turns."""
    rows = np.ones((len(wanted), 1), np.float32)
    for _ in range(_TURNS):
        rows /= np.maximum(np.abs(rows).max(), 1e-30)
        scaled = wanted * rows
        columns = (scaled * found).sum(0) / np.maximum((scaled**2).sum(0), 1e-30)
        scaled = wanted * columns
        rows = (scaled * found).sum(1, keepdims=True) / np.maximum((scaled**2).sum(1, keepdims=True), 1e-30)
    return np.asarray(rows * columns * wanted, np.float32)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The graph's initializers."""
    found = {}
    for name, value in ir.load(file).graph.initializers.items():
        if value.const_value is not None:
            found[name] = _shared(value.const_value.numpy())
    return found


def _shared(array: NDArray[Any]) -> Tensor:
    """A tensor over the same memory, which may be a file's: nobody writes to it, so torch need not warn that it must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _resize(module: nn.Module, formats: Mapping[str, LayerFormat], tensors: Mapping[str, Tensor]) -> None:
    """Leave out the feed-forward channels that the file has not."""
    for path, block in list(module.named_modules()):
        if not hasattr(block, "FFN"):
            continue
        inner, outer = feed_forward(module, path)
        layers = [cast(Linear, module.get_submodule(name)) for name in inner]
        kind = formats.get(inner[0], FLOAT32)
        held = tensors[f"{inner[0]}.{kind.main}"]
        count = held.shape[1 if kind.main in kind.columns else 0]
        if count != layers[0].out_features:
            for layer in layers:
                layer.resize(out_features=count)
            cast(Linear, module.get_submodule(outer)).resize(in_features=count)


def _as_stored(kind: LayerFormat, smoothed: bool) -> LayerFormat:
    return replace(kind, smoothed=smoothed) if kind.quantized else kind


def _shape(layer: Linear | Embedding) -> tuple[int, int]:
    """[out, in], as a checkpoint has it."""
    return (layer.out_features, layer.in_features) if isinstance(layer, Linear) else (layer.rows, layer.width)
