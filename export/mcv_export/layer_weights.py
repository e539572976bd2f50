"""One quantized layer's tensors, made from its weight a few rows at a time: the same for the file and for the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcv_calibration.blocks import Blocks, quantize_rows
from mcv_export.sources import Source
from mcv_export.storage import Storage
from mcv_graphs.formats import Int8Format, WeightFormat
from mcv_graphs.layers import Embedding, Linear
from mcv_runtime.errors import OptionError

Tensors = Mapping[str, NDArray[Any]]


def quantized_chunks(layer: Linear | Embedding, path: str, source: Source, storage: Storage) -> Iterator[tuple[int, Tensors]]:
    """The tensors with a row for each output channel: (first row, some rows of each); int8 weights as [rows, in]."""
    ready = storage.measured.blocks.get(path)
    if ready is not None and isinstance(layer.format, WeightFormat):
        _check(ready, layer.format, path, source)
        yield 0, _tensors(ready)
        return
    for first, rows in source.chunks():
        if isinstance(layer.format, Int8Format):
            yield first, int8_rows(rows, layer.format.largest)
        else:
            method = "k-quant" if storage.method == "gptq" else storage.method  # GPTQ's own are in `measured`
            yield first, _tensors(quantize_rows(rows, layer.format, method))


def constants(layer: Linear | Embedding, path: str, storage: Storage) -> dict[str, NDArray[Any]]:
    """What a layer has beside its weight."""
    kind = layer.format
    found: dict[str, NDArray[Any]] = {}
    if isinstance(kind, Int8Format) and kind.activations == "token":
        middle = np.array(0, np.int8) if kind.signed else np.array(128, np.uint8)
        found = {"input_scale": np.array(1 / 127, np.float32), "input_zero_point": middle}
    elif isinstance(kind, Int8Format) and kind.activations == "static":
        if path not in storage.measured.ranges:
            raise OptionError(f"no sample has reached {path}, so the range of its input is unknown; use int8-token for it")
        scale, zero = storage.measured.ranges[path].steps(signed=kind.signed)
        found = {"input_scale": np.array(scale), "input_zero_point": np.array(zero, np.int8 if kind.signed else np.uint8)}
    if kind.smoothed:
        found["input_factors"] = 1 / storage.measured.smoothing[path]
    return found


def int8_rows(rows_NK: NDArray[np.float32], largest: int) -> Tensors:
    """A scale for each row, symmetric: `qweight` int8 [N, K] within +-`largest` and `weight_scales` [N]."""
    scales = np.abs(rows_NK).max(1) / np.float32(largest)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    steps = rows_NK * inverse[:, None]
    np.rint(steps, out=steps)
    np.clip(steps, -largest, largest, out=steps)
    return {"qweight": steps.astype(np.int8), "weight_scales": scales}


def _tensors(blocks: Blocks) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {"qweight": blocks.qweight, "scales": blocks.scales}
    return tensors if blocks.zero_points is None else {**tensors, "zero_points": blocks.zero_points}


def _check(blocks: Blocks, kind: WeightFormat, path: str, source: Source) -> None:
    rows, width = source.shape
    wanted = (rows, kind.blocks(width), kind.block_size * kind.bits // 8)
    if blocks.qweight.shape != wanted:
        raise OptionError(
            f"the blocks of {path} have shape {list(blocks.qweight.shape)}, but its format asks for {list(wanted)}"
        )
