"""The grid of a block of weights: a scale and a zero point, found by rounding to nearest, and the steps of values on it.

Blocks stand in columns: values_SM holds M blocks of S values each. Every operation over all blocks then runs along
contiguous memory, four times faster than with the blocks in rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcv_graphs.layers import WeightFormat

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Grid:
    """Block m stands for `(q - zeros[m]) * scales[m]` with whole q from 0 to `levels`, and has whole zero points.

    Whole, because with zero points in float MatMulNBits leaves its int8 kernels: 110 times slower on one row (27.2 ms, not
    0.25), 1.7 times on 256 (4 bits, blocks of 32, 4096 x 4096, two threads, onnxruntime 1.32).
    """

    scales: Floats
    zeros: Floats
    levels: int

    @property
    def inverse(self) -> Floats:
        """1 / scale; 0 for a block without any value."""
        return np.divide(1, self.scales, out=np.zeros_like(self.scales), where=self.scales > 0)

    def steps(self, values_SM: Floats) -> Floats:
        """The nearest q of each value."""
        steps = values_SM * self.inverse
        np.rint(steps, out=steps)
        steps += self.zeros
        return np.clip(steps, 0, np.float32(self.levels), out=steps)

    def values(self, steps_SM: Floats) -> Floats:
        """What each q stands for."""
        return (steps_SM - self.zeros) * self.scales


def nearest(values_SM: Floats, weights: WeightFormat) -> Grid:
    """The grid that spans each block's values and zero."""
    levels = 2**weights.bits - 1
    low, high = np.minimum(values_SM.min(0), 0), np.maximum(values_SM.max(0), 0)
    if weights.symmetric:
        scales = np.maximum(-low, high) / np.float32(levels // 2)
        return Grid(scales, np.full_like(scales, 2 ** (weights.bits - 1)), levels)
    scales = (high - low) / np.float32(levels)
    grid = Grid(scales, np.zeros_like(scales), levels)
    return Grid(scales, np.rint(-low * grid.inverse), levels)
