"""One layer's tensors, made from its weight a few rows at a time: the same for the file and for the oracle."""

from __future__ import annotations

from functools import partial

import numpy as np

from mcv_calibration.blocks import Blocks, quantize_rows
from mcv_export.sources import PIECE_VALUES, Source
from mcv_export.storage import Storage
from mcv_graphs.formats import LayerFormat, Tensors, WeightFormat
from mcv_runtime.errors import OptionError


def layer_spans(
    kind: LayerFormat, path: str, source: Source, storage: Storage, values: int = PIECE_VALUES
) -> list[tuple[int, int]]:
    """The pieces of rows that `layer_rows` is asked for: blocks that are ready come at once."""
    return [(0, source.shape[0])] if _ready(kind, path, storage) else source.spans(values)


def layer_rows(kind: LayerFormat, path: str, source: Source, storage: Storage, first: int, last: int) -> Tensors:
    """Of the tensors with a row for each output channel, rows [first, last), none of them turned into columns."""
    if isinstance(kind, WeightFormat) and _ready(kind, path, storage):
        blocks = storage.measured.blocks[path]
        _check(blocks, kind, path, source)
        return kind.quantize(np.empty((0, 0), np.float32), lambda rows, weights: blocks)
    method = "k-quant" if storage.method == "gptq" else storage.method  # GPTQ's own are in `measured`
    return kind.quantize(source.rows(first, last), partial(quantize_rows, method=method))


def constants(kind: LayerFormat, path: str, storage: Storage) -> Tensors:
    """What a layer has beside its weight."""
    if kind.static and path not in storage.measured.ranges:
        raise OptionError(f"no sample has reached {path}, so the range of its input is unknown; use int8-token for it")
    found = kind.constants(storage.measured.ranges[path] if kind.static else None)
    return {**found, "input_factors": 1 / storage.measured.smoothing[path]} if kind.smoothed else found


def _ready(kind: LayerFormat, path: str, storage: Storage) -> bool:
    return isinstance(kind, WeightFormat) and path in storage.measured.blocks


def _check(blocks: Blocks, kind: WeightFormat, path: str, source: Source) -> None:
    rows, width = source.shape
    wanted = (rows, kind.blocks(width), kind.block_size * kind.bits // 8)
    if blocks.qweight.shape != wanted:
        raise OptionError(
            f"the blocks of {path} have shape {list(blocks.qweight.shape)}, but its format asks for {list(wanted)}"
        )
