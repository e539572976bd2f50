"""A histogram that grows with what it is given: bounded memory for a tensor of any number of values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 2048
_FINEST = -100
_BITS = 24
"""Of a float32's significand: bins narrower than its last bit would be of no use."""


@dataclass(slots=True, eq=False)
class Histogram:
    """Counts in bins whose width is a power of two and whose edges are multiples of it.

    A range that no longer fits doubles the width, and pairs of bins become one: no count is lost or moved. The result is the
    same in whatever order or portions the values came, so histograms of parts merge to the histogram of the whole.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[bins used]: bin i holds the values of [(start + i) * width, (start + i + 1) * width)."""
    start: int = 0
    exponent: int = _FINEST
    low: float = math.inf
    """The smallest value seen, exactly."""
    high: float = -math.inf

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> NDArray[np.float64]:
        """[bins used + 1]."""
        return (self.start + np.arange(len(self.counts) + 1, dtype=np.float64)) * self.width

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    def add(self, values: NDArray[np.float32], low: float | None = None, high: float | None = None) -> None:
        """Count values of any shape; `low` and `high` are the extremes of a whole that `values` is a sample of."""
        if values.size == 0:
            return
        self._cover(float(values.min()) if low is None else low, float(values.max()) if high is None else high)
        scaled = values.ravel() * np.float32(math.ldexp(1.0, -self.exponent))  # exact: only the exponent changes
        bins = np.floor(scaled, out=scaled).astype(np.int64)
        bins -= self.start
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def merge(self, other: Histogram) -> None:
        """Count what `other` has counted."""
        if math.isinf(other.low):
            return
        self._cover(other.low, other.high, at_least=other.exponent)
        coarse = (other.start + np.arange(len(other.counts))) >> (self.exponent - other.exponent)
        np.add.at(self.counts, coarse - self.start, other.counts)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it, for a file."""
        return {
            "counts": self.counts,
            "bins": np.array([self.start, self.exponent], np.int64),
            "ends": np.array([self.low, self.high], np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Histogram:
        """The inverse of `arrays`."""
        start, exponent = arrays["bins"].tolist()
        low, high = arrays["ends"].tolist()
        return cls(counts=arrays["counts"].astype(np.int64), start=start, exponent=exponent, low=low, high=high)

    def _cover(self, low: float, high: float, at_least: int = _FINEST) -> None:
        """Have bins from `low` to `high`, of the least width at which all of them fit."""
        low, high = min(self.low, low), max(self.high, high)
        # Doublings that are needed in any case; the loop adds the one or two that the edges cost.
        spread = math.frexp((high - low) / BINS)[1] - 1 if high > low else _FINEST
        exponent = max(self.exponent, at_least, spread, math.frexp(max(abs(low), abs(high)))[1] - _BITS)
        while _bin(high, exponent) - _bin(low, exponent) >= BINS:
            exponent += 1
        start = _bin(low, exponent)
        counts = np.zeros(_bin(high, exponent) - start + 1, np.int64)
        if len(self.counts):
            coarse = (self.start + np.arange(len(self.counts))) >> (exponent - self.exponent)
            np.add.at(counts, coarse - start, self.counts)
        self.counts, self.start, self.exponent, self.low, self.high = counts, start, exponent, low, high


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))
