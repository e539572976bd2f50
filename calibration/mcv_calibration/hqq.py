"""HQQ: half-quadratic quantization, a grid that fits most weights closely and lets a few be wrong.

After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the sum of |error|^p with p < 1
is split by an auxiliary error e into a shrinkage, which gives e, and a least squares fit of the grid to the values less e.
The published method fits zero points in float and no scales; ours have to be whole, so that the scale takes part.
"""

from __future__ import annotations

import numpy as np

from mcv_calibration.grids import Floats, Grid, nearest
from mcv_graphs.layers import WeightFormat

_NORM = 0.7
_BETA, _GROWTH = 2.0, 1.3
"""How dear the auxiliary error is at first, with errors in steps of the grid, and by how much dearer each time."""
_FITS, _SCALE_FITS = 8, 3


def hqq(values_SM: Floats, weights: WeightFormat) -> Grid:
    """The grid of each block."""
    start = grid = nearest(values_SM, weights)
    beta = _BETA
    if not weights.symmetric:
        for _ in range(_FITS):
            grid = _fit(values_SM, grid, beta)
            beta *= _GROWTH
        grid = Grid(grid.scales, np.clip(np.rint(grid.zeros), 0, grid.levels), grid.levels)
    for _ in range(_SCALE_FITS):
        grid = _fit_scale(values_SM, grid, beta)
    better = _loss(values_SM, grid) < _loss(values_SM, start)
    return Grid(np.where(better, grid.scales, start.scales), np.where(better, grid.zeros, start.zeros), grid.levels)


def _fit(values_SM: Floats, grid: Grid, beta: float) -> Grid:
    """A line through (q, value less its auxiliary error), whose slope is the scale; zero points may be fractions."""
    steps, kept = _split(values_SM, grid, beta)
    mean, mean_kept = steps.mean(0), kept.mean(0)
    steps -= mean
    slope = _slope(steps, kept)
    zeros = np.clip(mean - mean_kept / slope, 0, grid.levels)
    return Grid(grid.scales * slope, zeros, grid.levels)


def _fit_scale(values_SM: Floats, grid: Grid, beta: float) -> Grid:
    steps, kept = _split(values_SM, grid, beta)
    steps -= grid.zeros
    return Grid(grid.scales * _slope(steps, kept), grid.zeros, grid.levels)


def _split(values_SM: Floats, grid: Grid, beta: float) -> tuple[Floats, Floats]:
    """q of each value, and the values without their auxiliary errors; both in steps of the grid."""
    scaled = values_SM * grid.inverse
    steps = scaled + grid.zeros
    np.rint(steps, out=steps)
    np.maximum(steps, 0, out=steps)
    np.minimum(steps, np.float32(grid.levels), out=steps)
    error = scaled - steps
    error += grid.zeros
    size = np.abs(error)
    shrunk = _power(size, _NORM - 1)
    shrunk *= np.float32(-1 / beta)
    shrunk += size
    np.maximum(shrunk, 0, out=shrunk)
    scaled -= np.copysign(shrunk, error, out=shrunk)
    return steps, scaled


def _loss(values_SM: Floats, grid: Grid) -> Floats:
    """Sum of |error|^p of each block."""
    error = grid.values(grid.steps(values_SM))
    error -= values_SM
    total: Floats = _power(np.abs(error, out=error), _NORM).sum(0)
    return total


def _power(positive: Floats, exponent: float) -> Floats:
    """positive ** exponent; numpy has fast code for logarithm and exponential, but not for powers."""
    result = positive + np.float32(1e-20)
    np.log(result, out=result)
    result *= np.float32(exponent)
    np.exp(result, out=result)
    return result


def _slope(steps_SM: Floats, kept_SM: Floats) -> Floats:
    """Of the line through the origin that fits best; 1 where that leads nowhere."""
    above, below = np.einsum("sm,sm->m", steps_SM, kept_SM), np.einsum("sm,sm->m", steps_SM, steps_SM)
    slope: Floats = np.divide(above, below, out=np.ones_like(above), where=(above > 0) & (below > 0))
    return slope
