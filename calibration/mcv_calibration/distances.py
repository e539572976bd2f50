"""How far tensors and next-token distributions are from the right ones, added up over any number of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_calibration.intervals import Interval, Share, bootstrap

if TYPE_CHECKING:
    from numpy.typing import NDArray

COSINE_EDGES = (-1.0, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0)
KL_EDGES = (0.0, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, math.inf)
"""Of the histograms; the last bin holds its upper edge too."""
_TINY = 1e-300
_BROKEN = 1e6
"""Stands for an error beyond all bounds: of numbers that are not finite, which JSON has no word for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """`counts[i]` values lie between `edges[i]` and `edges[i + 1]`; an edge of None is infinite."""

    edges: tuple[float | None, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """Of vectors (patches or visual tokens) against the reference's."""

    vectors: int
    relative: float
    """Root mean square of the difference over that of the reference."""
    interval: Interval | None
    """Of `relative`; None: there is one sample alone."""
    sqnr_db: float | None
    """The same as signal to noise in decibels; None: no noise at all."""
    cosine_mean: float
    cosine_p1: float
    """One vector in a hundred is worse."""
    cosine_min: float
    cosines: Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionError:
    """Of next-token distributions against the reference's, in nats: KL(reference || bundle)."""

    tokens: int
    kl_mean: float
    kl_interval: Interval | None
    """None: there is one sample alone."""
    kl_p95: float
    kl_max: float
    agreeing: Share
    """Tokens where both find the same one likeliest."""
    divergences: Histogram

    @property
    def agreement(self) -> float:
        return self.agreeing.value


class Energy:
    """Signal and noise of one tensor, in the memory of two numbers a sample."""

    def __init__(self) -> None:
        self._signals: list[float] = []
        self._noises: list[float] = []

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> None:
        """Of one sample."""
        self._signals.append(float(np.square(expected, dtype=np.float64).sum()))
        self._noises.append(float(np.square(expected - found, dtype=np.float64).sum()))

    @property
    def relative(self) -> float:
        signal, noise = sum(self._signals), sum(self._noises)
        if not signal:
            return 1.0 if noise else 0.0
        relative = math.sqrt(noise / signal)
        return relative if relative < _BROKEN else _BROKEN  # also where it is not a number

    @property
    def interval(self) -> Interval | None:
        """Of `relative`."""
        if self.relative == _BROKEN or (squares := bootstrap(self._noises, self._signals)) is None:
            return None
        return Interval(math.sqrt(squares.low), math.sqrt(squares.high))

    @property
    def sqnr_db(self) -> float | None:
        return decibels(self.relative)


def decibels(relative: float) -> float | None:
    """A relative error as signal to noise; None: there is no noise."""
    return -20 * math.log10(relative) if relative else None


class TensorErrors:
    """Adds up a `TensorError`."""

    def __init__(self) -> None:
        self._energy = Energy()
        self._cosines: list[NDArray[np.float64]] = []

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> None:
        """Of one sample, or of one call: two arrays [..., width] of the same shape."""
        expected_NW, found_NW = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (expected, found))
        self._energy.add(expected_NW, found_NW)
        self._cosines.append(cosines(expected_NW, found_NW))

    def result(self) -> TensorError | None:
        """None: nothing was added."""
        if not self._cosines:
            return None
        values = np.concatenate(self._cosines)
        return TensorError(
            vectors=len(values),
            relative=self._energy.relative,
            interval=self._energy.interval,
            sqnr_db=self._energy.sqnr_db,
            cosine_mean=float(values.mean()),
            cosine_p1=float(np.quantile(values, 0.01)),
            cosine_min=float(values.min()),
            cosines=_histogram(values, COSINE_EDGES),
        )


class DistributionErrors:
    """Adds up a `DistributionError`."""

    def __init__(self) -> None:
        self._divergences: list[NDArray[np.float64]] = []
        self._agreeing = 0

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> None:
        """Of one sample: logits [tokens, vocab] of the reference and of the bundle, after the same text."""
        self._divergences.append(divergences(expected, found))
        self._agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())

    def result(self) -> DistributionError | None:
        """None: nothing was added."""
        if not self._divergences:
            return None
        values = np.concatenate(self._divergences)
        return DistributionError(
            tokens=len(values),
            kl_mean=float(values.mean()),
            kl_interval=bootstrap([float(one.sum()) for one in self._divergences], [len(one) for one in self._divergences]),
            kl_p95=float(np.quantile(values, 0.95)),
            kl_max=float(values.max()),
            agreeing=Share.of(self._agreeing, len(values)),
            divergences=_histogram(values, KL_EDGES),
        )


def cosines(a_NW: NDArray[np.float64], b_NW: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each pair of rows: [N]. By the distance of the unit vectors, so that equal rows have exactly 1; a row of zeros is
    like another such and unlike all else."""
    a_N, b_N = np.linalg.norm(a_NW, axis=1), np.linalg.norm(b_NW, axis=1)
    units_NW = a_NW / np.maximum(a_N, _TINY)[:, None] - b_NW / np.maximum(b_N, _TINY)[:, None]
    similar_N = np.where(np.minimum(a_N, b_N) == 0, np.maximum(a_N, b_N) == 0, 1 - np.square(units_NW).sum(1) / 2)
    result: NDArray[np.float64] = np.nan_to_num(similar_N, nan=-1)
    return result


def divergences(expected: NDArray[Any], found: NDArray[Any]) -> NDArray[np.float64]:
    """KL(expected || found) of each pair of rows of logits, in nats: [N]."""
    p, q = _log_softmax(expected), _log_softmax(found)
    values = np.maximum((np.exp(p) * (p - q)).sum(-1), 0)  # below 0 only by rounding
    result: NDArray[np.float64] = np.nan_to_num(values, nan=_BROKEN, posinf=_BROKEN)
    return result


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _histogram(values: NDArray[np.float64], edges: tuple[float, ...]) -> Histogram:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(
        edges=tuple(edge if math.isfinite(edge) else None for edge in edges), counts=tuple(int(count) for count in counts)
    )
