"""How sure a figure is: 95 % intervals of shares, and of figures that are a sum over samples by another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NAMED = "95 %: Wilson's for shares; of means and errors, a bootstrap over the samples"
_Z = 1.959964
_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `total`, and what share of all there are they may stand for."""

    hits: int
    total: int
    interval: Interval

    @classmethod
    def of(cls, hits: int, total: int) -> Share:
        return cls(hits, total, wilson(hits, total))

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else 0.0


def wilson(hits: int, total: int) -> Interval:
    """Wilson's score interval (1927), which holds for shares near 0 and 1 too; of nothing, everything."""
    if not total:
        return Interval(0.0, 1.0)
    share, square = hits / total, _Z**2 / total
    middle = (share + square / 2) / (1 + square)
    reach = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return Interval(0.0 if not hits else middle - reach, 1.0 if hits == total else middle + reach)


def bootstrap(parts: Sequence[float], wholes: Sequence[float]) -> Interval | None:
    """Of sum(parts) / sum(wholes), drawn anew from the samples that gave a part and a whole each; None: of a single one."""
    if len(parts) < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, len(parts), (_DRAWS, len(parts)))
    sums = np.asarray(wholes, np.float64)[drawn].sum(1)
    ratios = np.divide(np.asarray(parts, np.float64)[drawn].sum(1), sums, out=np.zeros(_DRAWS), where=sums > 0)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(float(low), float(high))
