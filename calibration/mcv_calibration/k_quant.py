"""k-quant: of many grids for a block, the one with the least weighted squared error.

Named after llama.cpp's formats, whose search this is in spirit: try ranges somewhat narrower and wider than the block's own,
round, and fit the scale to the rounded values by least squares. Zero points stay whole here, so they are searched as well.
"""

from __future__ import annotations

import numpy as np

from mcv_calibration.grids import Floats, Grid, nearest
from mcv_graphs.layers import WeightFormat

_SPANS = {4: tuple(np.linspace(0.7, 1.1, 9)), 8: (0.98, 0.99)}
"""Widths of the ranges tried, as shares of the block's own; more of them gain nothing, and with 8 bits there is next
to nothing to gain."""


def k_quant(values_SM: Floats, weights: WeightFormat, importance_SM: Floats | None = None) -> Grid:
    """The grid of each block; errors weigh as `importance_SM` says, or all alike."""
    search = _Search(values_SM, importance_SM, nearest(values_SM, weights))
    base = search.best
    search.offer(base)
    middle = np.float32(0.5) * (np.minimum(values_SM.min(0), 0) + np.maximum(values_SM.max(0), 0))
    for span in _SPANS[weights.bits]:
        grid = Grid(base.scales * np.float32(span), base.zeros, base.levels)
        if not weights.symmetric:
            zeros = np.rint(np.float32(0.5 * grid.levels) - middle * grid.inverse)
            grid = Grid(grid.scales, np.clip(zeros, 0, grid.levels), grid.levels)
        search.offer(grid)
    if not weights.symmetric:
        best = search.best
        for shift in (-1, 1):
            search.offer(Grid(best.scales, np.clip(best.zeros + np.float32(shift), 0, best.levels), best.levels))
    search.offer(search.best)  # the fitted scale rounds some values differently, and those have a fit of their own
    return search.best


class _Search:
    """The best grid so far, block by block.

    Given the steps u = q - zero of a block, the best scale is sum(w v u) / sum(w u u).
    """

    def __init__(self, values_SM: Floats, importance_SM: Floats | None, start: Grid) -> None:
        self._values = values_SM
        self._importance = importance_SM
        self._weighted = values_SM if importance_SM is None else values_SM * importance_SM
        self._error = np.full_like(start.scales, np.inf)
        self.best = start

    def offer(self, grid: Grid) -> None:
        """Fit the grid's scale and keep it for the blocks where it errs less than the best so far."""
        u = self._values * grid.inverse
        np.rint(u, out=u)
        np.maximum(u, -grid.zeros, out=u)
        np.minimum(u, np.float32(grid.levels) - grid.zeros, out=u)
        product, square = np.einsum("sm,sm->m", self._weighted, u), self._sum_of_squares(u)
        scale = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        u *= scale
        u -= self._values  # squared and summed: the same from the two sums would drown 8 bits' errors in rounding
        error = self._sum_of_squares(u)
        better = (error < self._error) & (scale > 0)
        self._error = np.where(better, error, self._error)
        self.best = Grid(np.where(better, scale, self.best.scales), np.where(better, grid.zeros, self.best.zeros), grid.levels)

    def _sum_of_squares(self, u: Floats) -> Floats:
        weighted = u if self._importance is None else u * self._importance
        total: Floats = np.einsum("sm,sm->m", weighted, u)
        return total
