"""Weight-only quantization, a block of consecutive input channels at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mcv_calibration.grids import Floats, Grid, nearest
from mcv_calibration.k_quant import k_quant
from mcv_graphs.formats import WeightFormat
from mcv_graphs.ops import dequantize
from mcv_runtime.errors import OptionError, shown

Method = Literal["rtn", "k-quant"]
METHODS: tuple[Method, ...] = ("rtn", "k-quant")
_USUAL: dict[int, Method] = {4: "k-quant", 8: "rtn"}
"""By bits, where nobody says: 8 have next to nothing to gain from a search."""
_TILE_BLOCKS = 4096
"""Blocks that are worked on at once: few enough for a processor's cache, which is what makes the searches affordable."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a weight in the layout of MatMulNBits, as `mcv_graphs.ops.matmul_nbits` describes it."""

    qweight: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


def quantize_rows(rows_NK: Floats, weights: WeightFormat, method: Method | None = None) -> Blocks:
    """Quantize [N, K]; each row of each block of K gets a scale, and without symmetry a zero point.

    All errors weigh alike: by what weights say of their inputs, or by the weights' own size, more was lost (models/tiny).
    """
    method = method or _USUAL[weights.bits]
    if method not in METHODS:
        raise OptionError(f"method {shown(method)} is none of {', '.join(METHODS)}")
    rows, width = rows_NK.shape
    count, size = weights.blocks(width), weights.block_size
    result = BlockRows(rows, width, weights)
    step = max(_TILE_BLOCKS // count, 1)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        tile = rows_NK[first:last]
        if width < count * size:
            tile = np.pad(tile, [(0, 0), (0, count * size - width)])
        values = np.ascontiguousarray(tile.reshape(-1, size).T)
        result.put(first, last, values, (k_quant if method == "k-quant" else nearest)(values, weights))
    return result.blocks()


class BlockRows:
    """Blocks that are filled in, some rows at a time."""

    def __init__(self, rows: int, width: int, weights: WeightFormat) -> None:
        count = weights.blocks(width)
        self._bits, self._symmetric = weights.bits, weights.symmetric
        self._qweight = np.empty((rows, count, weights.block_size * weights.bits // 8), np.uint8)
        self._scales = np.empty((rows, count), np.float32)
        self._zeros = np.empty((rows, count), np.uint8)

    def put(self, first: int, last: int, values_SM: Floats, grid: Grid) -> None:
        """All blocks of rows [first, last), row by row."""
        steps = grid.steps(values_SM).astype(np.uint8)
        packed = _pack(steps, self._bits)
        self._qweight[first:last].reshape(-1, len(packed))[...] = packed.T
        self._scales[first:last] = grid.scales.reshape(last - first, -1)
        self._zeros[first:last] = grid.zeros.reshape(last - first, -1)

    def put_block(self, block: int, steps_SN: Floats, grid: Grid) -> None:
        """One block of every row, its values rounded before."""
        self._qweight[:, block] = _pack(steps_SN.astype(np.uint8), self._bits).T
        self._scales[:, block] = grid.scales
        self._zeros[:, block] = grid.zeros

    def blocks(self) -> Blocks:
        zeros = None if self._symmetric else np.ascontiguousarray(_pack(self._zeros.T, self._bits).T)
        return Blocks(qweight=self._qweight, scales=self._scales, zero_points=zeros)


def dequantize_rows(blocks: Blocks, weights: WeightFormat, width: int) -> Floats:
    """What the blocks stand for: [N, width] float32."""
    zeros = None if blocks.zero_points is None else torch.from_numpy(blocks.zero_points)
    values = dequantize(torch.from_numpy(blocks.qweight), torch.from_numpy(blocks.scales), zeros, weights.bits)
    return np.ascontiguousarray(values[:, :width].numpy())


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Put two 4-bit values of the first axis into a byte, low half first; an odd one out is padded with 0."""
    if bits == 8:
        return values
    if len(values) % 2:
        values = np.pad(values, [(0, 1)] + [(0, 0)] * (values.ndim - 1))
    return (values[::2] | values[1::2] << 4).astype(np.uint8, copy=False)
