"""What every channel of a layer's input reaches, over any number of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True, eq=False)
class Channels:
    """Exact extremes and the sum of squares of each channel, [K]."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    squares: NDArray[np.float64]
    rows: int

    @classmethod
    def of(cls, x_RK: NDArray[np.float32]) -> Channels:
        """Of a matrix whose rows are tokens or patches."""
        squares = np.einsum("rk,rk->k", x_RK, x_RK).astype(np.float64)
        return cls(x_RK.min(axis=0), x_RK.max(axis=0), squares, len(x_RK))

    @property
    def reach(self) -> NDArray[np.float32]:
        """Largest magnitude."""
        reach: NDArray[np.float32] = np.maximum(np.abs(self.low), np.abs(self.high))
        return reach

    def merge(self, other: Channels) -> None:
        """Take in what `other` has seen."""
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)
        self.squares += other.squares
        self.rows += other.rows

    @classmethod
    def together(cls, parts: Sequence[Channels]) -> Channels:
        """What all of them have seen."""
        total = cls.from_arrays(parts[0].arrays())
        for part in parts[1:]:
            total.merge(part)
        return total

    def divided(self, factors_K: NDArray[np.float32]) -> Channels:
        """Of the input divided by positive factors."""
        return Channels(
            self.low / factors_K, self.high / factors_K, self.squares / factors_K.astype(np.float64) ** 2, self.rows
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it, for a file."""
        return {"low": self.low, "high": self.high, "squares": self.squares, "rows": np.array(self.rows)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Channels:
        """The inverse of `arrays`."""
        return cls(arrays["low"].copy(), arrays["high"].copy(), arrays["squares"].copy(), int(arrays["rows"]))
