"""Put the patches of one visual token side by side, as towers want them that merge patches on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def nested_order(rows: int, columns: int, merge: int) -> NDArray[np.int64]:
    """Row-major indices of the patches of each `merge` x `merge` square: [rows * columns / merge^2, merge^2].

    Squares come row by row. Inside one, its four quarters come one after the other, each in the same way, down to 2 x 2.
    """
    squares = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge).transpose(0, 2, 1, 3)
    return squares.reshape(-1, merge * merge)[:, _z_order(merge)]


def _z_order(side: int) -> NDArray[np.int64]:
    """Row-major indices of a `side` x `side` square (a power of two), quarter by quarter."""
    index = np.arange(side * side).reshape(side, side)
    if side <= 2:
        return index.reshape(-1)
    quarters = index.reshape(2, side // 2, 2, side // 2).transpose(0, 2, 1, 3).reshape(4, -1)
    return quarters[:, _z_order(side // 2)].reshape(-1)
