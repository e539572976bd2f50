"""Weight-only quantization, a block of consecutive input channels at a time, rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcv_graphs.layers import WeightFormat


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a weight in the layout of MatMulNBits, as `mcv_graphs.ops.matmul_nbits` describes it."""

    qweight: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


def quantize_rows(rows_NK: NDArray[np.float32], weights: WeightFormat) -> Blocks:
    """Quantize [N, K]; each row of each block of K gets a scale, and without symmetry a zero point."""
    rows, width = rows_NK.shape
    blocks, size = weights.blocks(width), weights.block_size
    if padding := blocks * size - width:
        rows_NK = np.pad(rows_NK, ((0, 0), (0, padding)))
    values = rows_NK.reshape(rows, blocks, size)
    levels = 2**weights.bits - 1
    low, high = np.minimum(values.min(2), 0), np.maximum(values.max(2), 0)
    if weights.symmetric:
        scales = np.maximum(-low, high) / np.float32(levels // 2)
    else:
        scales = (high - low) / np.float32(levels)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    if weights.symmetric:
        zeros = np.full_like(scales, 2 ** (weights.bits - 1))
    else:
        zeros = np.rint(-low * inverse)
    steps = values * inverse[..., None]
    np.rint(steps, out=steps)
    steps += zeros[..., None]
    np.clip(steps, 0, levels, out=steps)
    return Blocks(
        qweight=_pack(steps.astype(np.uint8), weights.bits),
        scales=scales,
        zero_points=None if weights.symmetric else _pack(zeros.astype(np.uint8), weights.bits),
    )


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Put two 4-bit values of the last axis into a byte, low half first; an odd one out is padded with 0."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8, copy=False)
