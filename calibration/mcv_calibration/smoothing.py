"""Move outliers from a layer's input into its weight: x / s and W * s multiply to the same, and both quantize well.

Source of the formula: SmoothQuant (arXiv:2211.10438), equation 4. Whether it is worth it is estimated from the noise of
rounding: 8-bit steps that a tensor of activations shares, and steps that each row of the weight has for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mcv_calibration.channels import Channels
from mcv_runtime.errors import OptionError

WeightRows = Callable[[str], Iterable[NDArray[np.float32]]]
"""A layer's weight by its path, as consecutive blocks of rows [n, K]."""

MAX_FACTOR = 1e4
"""Channels 300 times the rest were seen in trained towers, and a weight's columns vary too."""
FREE_GAIN, PAID_GAIN = 1.0, 0.7
"""Most noise left, against none smoothed, at which smoothing is used: in a norm's weight it costs nothing, else a product."""
_LEVELS_X, _LEVELS_W = 255, 127


def smoothing_factors(
    channels: Channels,
    layers: Sequence[str],
    weight: WeightRows,
    *,
    alpha: float,
    folded: bool,
    shared: Sequence[int] | None = None,
) -> NDArray[np.float32] | None:
    """Factors s [K] of the input that `layers` share, their median 1; None where they would gain too little.

    `alpha` is how much of the difference between channels moves into the weight, 0 to 1. `folded`: the factors disappear
    in the weight of what is before. `shared`: columns that have the same number have one factor.
    """
    if not 0 <= alpha <= 1:
        raise OptionError(f"smoothing={alpha}: give a number from 0 (off) to 1")
    if alpha == 0:
        return None
    columns_K, energy_K, rows_now = _columns(layers, weight)
    reach_K = channels.reach.astype(np.float64)
    factors_K = _balanced(reach_K, columns_K, alpha)
    if shared is not None:
        _, number_K = np.unique(shared, return_inverse=True)
        factors_K = np.exp(np.bincount(number_K, np.log(factors_K)) / np.bincount(number_K))[number_K].astype(np.float32)
    before = _noise(channels, energy_K, rows_now)
    rows_then = sum(float(np.sum(np.abs(rows * factors_K).max(axis=1) ** 2)) for path in layers for rows in weight(path))
    after = _noise(channels.divided(factors_K), energy_K * factors_K.astype(np.float64) ** 2, rows_then)
    return factors_K if after < before * (FREE_GAIN if folded else PAID_GAIN) else None


def unseen_factors(
    typical_K: NDArray[np.float64],
    energy_K: NDArray[np.float64],
    *,
    alpha: float,
    shared: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Factors s [K] of an input that nobody saw: what its maker's weights say that each channel's root mean square is.

    `energy_K` is that of the weights' columns, which rounding, whose steps whole blocks share, would else lose in small ones. A
    column counts by its root mean square: by its largest weight, as above, most recipes of q4 and q8 diverged more
    (models/tiny). `shared` as above.
    """
    if shared is None:
        return _balanced(typical_K, np.sqrt(energy_K), alpha)
    _, number_K = np.unique(shared, return_inverse=True)
    typical, energy = (np.bincount(number_K, values) for values in (typical_K**2, energy_K))
    return _balanced(np.sqrt(typical), np.sqrt(energy), alpha)[number_K]


def _balanced(reach_K: NDArray[np.float64], columns_K: NDArray[np.float64], alpha: float) -> NDArray[np.float32]:
    """max|x|^alpha / max|W|^(1 - alpha) of each channel; 1 for a channel that is always zero."""
    used = reach_K > 0
    if not used.any() or not columns_K.any():
        return np.ones(len(reach_K), np.float32)
    # A column of (nearly) zeros lets its channel be divided by any number: by many, but not by infinitely many.
    columns_K = np.maximum(columns_K, np.median(columns_K[columns_K > 0]) / MAX_FACTOR)
    factors_K = np.ones_like(reach_K)
    factors_K[used] = reach_K[used] ** alpha / columns_K[used] ** (1 - alpha)
    factors_K[used] /= np.median(factors_K[used])
    return np.clip(factors_K, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)


def _columns(layers: Sequence[str], weight: WeightRows) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Largest magnitude and energy of each column over all layers, and the sum of the rows' squared largest magnitudes."""
    largest_K, energy_K, rows_squared = np.zeros(1), np.zeros(1), 0.0
    for path in layers:
        for rows_NK in weight(path):
            magnitude = np.abs(rows_NK)
            largest_K = np.maximum(largest_K, magnitude.max(axis=0))
            energy_K = energy_K + np.einsum("nk,nk->k", magnitude, magnitude)
            rows_squared += float(np.sum(magnitude.max(axis=1).astype(np.float64) ** 2))
    return largest_K, energy_K, rows_squared


def _noise(channels: Channels, energy_K: NDArray[np.float64], rows_squared: float) -> float:
    """Expected squared error of the outputs of one token, from rounding its input and from rounding the weight (times 12)."""
    span = max(float(channels.high.max()), 0.0) - min(float(channels.low.min()), 0.0)
    of_input = (span / _LEVELS_X) ** 2 * float(energy_K.sum())
    of_weight = rows_squared / _LEVELS_W**2 * float(channels.squares.sum()) / max(channels.rows, 1)
    return of_input + of_weight
