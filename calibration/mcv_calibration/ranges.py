"""From the histogram of a tensor's values to the range that 256 levels are spread over; zero always has a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from mcv_calibration.histogram import Histogram
from mcv_calibration.measured import Range
from mcv_calibration.recipe import Ranges
from mcv_runtime.errors import OptionError, shown

LEVELS = 256
PERCENTILE = 99.999
"""Percent of the values inside the range; half of the rest is cut off at each end. On the demonstration model 99.99 already
costs the rare values that single patches live on: their worst visual token falls from a cosine of 0.995 to 0.977."""


def find_range(histogram: Histogram, method: Ranges) -> Range:
    """The range by one of the methods; raises `OptionError` for an unknown one."""
    if method not in METHODS:
        raise OptionError(f"ranges={shown(method)}: choose one of {', '.join(get_args(Ranges))}")
    low, high = METHODS[method](histogram)
    return Range(min(low, 0.0), max(high, 0.0))


def minmax(histogram: Histogram) -> tuple[float, float]:
    """All values."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, percent: float = PERCENTILE) -> tuple[float, float]:
    """All values but the outermost; values are taken to lie evenly in their bin."""
    if not 50 < percent <= 100:
        raise OptionError(f"a percentile of {percent} is not above 50 and at most 100")
    cut = histogram.total * (100 - percent) / 200
    return _quantile(histogram, cut), _quantile(histogram, histogram.total - cut)


def _quantile(histogram: Histogram, rank: float) -> float:
    """The value that `rank` of the values are below."""
    reached = np.cumsum(histogram.counts)
    number = min(int(np.searchsorted(reached, rank)), len(reached) - 1)
    count = int(histogram.counts[number])
    inside = (rank - float(reached[number] - count)) / max(count, 1)
    value = (histogram.start + number + inside) * histogram.width
    return min(max(value, histogram.low), histogram.high)  # bins reach a little past the extremes


def mse(histogram: Histogram) -> tuple[float, float]:
    """The ends with the least expected squared error: of rounding (a twelfth of a step squared) and of clipping.

    Ends are where the levels really end: zero is moved onto a level, which matters where many values lie at one end, as after
    GELU.
    """
    counts, edges = histogram.counts.astype(np.float64), histogram.edges
    every = max(len(counts) // LEVELS, 1)
    lows, highs = (np.append(edges[side][::every], 0.0) for side in (edges < 0, slice(None, None, -1)))
    low, high = (ends.ravel() for ends in np.meshgrid(np.minimum(lows, 0.0), np.maximum(highs, 0.0)))
    step = np.maximum(high - low, histogram.width) / (LEVELS - 1)
    zero = np.round(-low / step)
    low, high = -zero * step, (LEVELS - 1 - zero) * step
    below, clipped_low = _tail(counts, edges, low)
    above, clipped_high = _tail(counts[::-1], -edges[::-1], -high)
    errors = (counts.sum() - below - above) * step**2 / 12 + clipped_low + clipped_high
    best = np.argmin(errors)
    return float(low[best]), float(high[best])


def _tail(
    counts: NDArray[np.float64], edges: NDArray[np.float64], ends: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each end: the number of values in the bins below it, and the sum of their squared distances from it."""
    centres = (edges[:-1] + edges[1:]) / 2
    sums = [np.concatenate(([0.0], np.cumsum(counts * centres**power))) for power in range(3)]
    bins = np.clip(np.round((ends - edges[0]) / (edges[1] - edges[0])).astype(np.int64), 0, len(counts))
    number, first, second = (total[bins] for total in sums)
    return number, np.maximum(second - 2 * ends * first + ends**2 * number, 0.0)


METHODS: dict[Ranges, Callable[[Histogram], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}
