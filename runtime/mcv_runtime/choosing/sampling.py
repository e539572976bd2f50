"""Draw a token from what a model says: penalties, temperature and the usual cuts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.errors import OptionError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NUCLEUS = 512
"""Tokens among which a nucleus is looked for first; it rarely is as large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn; the default is the model's own distribution.

    In this order, each on what the one before has left: `logit_bias` is added to the logits of the ids it names,
    `repetition_penalty` divides positive logits of tokens that were generated before and multiplies negative ones,
    `presence_penalty` is subtracted from them, and `frequency_penalty` as often as each was generated, `temperature` divides
    all (0: the likeliest token, nothing is drawn), `top_k` keeps that many (0: all) and what is as likely as the last of them,
    `top_p` the fewest that make up that probability, `min_p` those at least that fraction as likely as the likeliest. Tokens
    are ordered by their logits, of which many round to one probability; of equal logits the lower ids come first. Without a
    `seed` every answer differs.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise OptionError(f"temperature must be at least 0, not {self.temperature}")
        if not self.top_k >= 0:
            raise OptionError(f"top_k must be at least 1, or 0 for all tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise OptionError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 1e-6 <= self.repetition_penalty <= 1e6:  # beyond, logits in float32 are 0 or infinite
            raise OptionError(f"repetition_penalty must be from 1e-6 to 1e6, not {self.repetition_penalty}")
        if not -1e6 <= self.presence_penalty <= 1e6:
            raise OptionError(f"presence_penalty must be from -1e6 to 1e6, not {self.presence_penalty}")
        if not -1e6 <= self.frequency_penalty <= 1e6:
            raise OptionError(f"frequency_penalty must be from -1e6 to 1e6, not {self.frequency_penalty}")
        for token, bias in self.logit_bias.items():
            if not _is_number(token, Integral) or token < 0 or not _is_number(bias, Real) or not -1e6 <= bias <= 1e6:
                raise OptionError(
                    f"logit_bias gives numbers from -1e6 to 1e6 by token id, not {shown(bias)} for {shown(token)}"
                )
        if self.seed is not None and self.seed < 0:
            raise OptionError(f"seed must be at least 0, not {self.seed}")


class Sampler:
    """Draws the tokens of one answer with a generator of its own: the same seed, the same tokens."""

    def __init__(self, settings: Sampling) -> None:
        self._settings = settings
        self._generator = np.random.Generator(np.random.PCG64(settings.seed))

    def draw(self, logits_V: NDArray[np.floating[Any]], generated: Collection[int] = ()) -> int:
        """The next token after those `generated`; tokens whose logit is -inf are never drawn."""
        ids, weights = _candidates(logits_V, self._settings, generated)
        if len(ids) == 1:
            return int(ids[0])
        cumulative = np.cumsum(weights)
        place = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        last = np.searchsorted(cumulative, cumulative[-1])  # rounding must not lead behind it, to what has no weight
        return int(ids[min(int(place), int(last))])


def distribution(
    logits_V: NDArray[np.floating[Any]], settings: Sampling, generated: Collection[int] = ()
) -> NDArray[np.float64]:
    """The exact probabilities [vocab] that `Sampler` draws from."""
    ids, weights = _candidates(logits_V, settings, generated)
    probabilities = np.zeros(len(logits_V))
    probabilities[ids] = weights / weights.sum()
    return probabilities


def penalised(
    scores_V: NDArray[np.floating[Any]],
    generated: Collection[int],
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> NDArray[np.floating[Any]]:
    """`scores_V` with `generated` tokens made less likely; only the last counts how often (arXiv:1909.05858 for the first).

    The scores themselves where there is nothing to do, else a copy.
    """
    if not generated or (repetition_penalty == 1.0 and not presence_penalty and not frequency_penalty):
        return scores_V
    ids, counts = np.unique(np.fromiter(generated, np.int64, len(generated)), return_counts=True)
    result = scores_V.copy()
    before, penalty = result[ids], result.dtype.type(repetition_penalty)
    result[ids] = np.where(before > 0, before / penalty, before * penalty) - result.dtype.type(presence_penalty)
    if frequency_penalty:
        result[ids] -= (frequency_penalty * counts).astype(result.dtype)
    return result


def biased(scores_V: NDArray[np.floating[Any]], logit_bias: Mapping[int, float]) -> NDArray[np.floating[Any]]:
    """`scores_V` with what is said of single ids added; the scores themselves where nothing is, else a copy."""
    if not logit_bias:
        return scores_V
    ids = np.fromiter(logit_bias, np.int64, len(logit_bias))
    if ids.max() >= len(scores_V):
        raise OptionError(f"logit_bias names the token {ids.max()}, but this model has {len(scores_V):,}")
    result = scores_V.copy()
    result[ids] += np.fromiter(logit_bias.values(), result.dtype, len(ids))
    return result


def likeliest(
    scores_V: NDArray[np.floating[Any]], count: int, logits_V: NDArray[np.floating[Any]] | None = None
) -> NDArray[np.int64]:
    """Ids of the `count` highest scores, best first; none whose score is -inf.

    Of equal scores those with the highest `logits_V`, which the scores were made of and rounded from, and then the lowest ids.
    """
    ids = _above(scores_V, count)
    exact_V = scores_V if logits_V is None else logits_V
    return ids[np.lexsort((-exact_V[ids], -scores_V[ids]))][:count]


def _candidates(
    logits_V: NDArray[np.floating[Any]], settings: Sampling, generated: Collection[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ascending ids of the tokens that may be drawn, and weights in proportion to their probabilities."""
    scores_V = penalised(
        biased(logits_V, settings.logit_bias),
        generated,
        settings.repetition_penalty,
        settings.presence_penalty,
        settings.frequency_penalty,
    )
    if settings.temperature == 0:
        return np.array([scores_V.argmax()]), np.ones(1)
    ids = np.arange(len(scores_V))
    if 0 < settings.top_k < len(scores_V):
        ids = _above(scores_V, settings.top_k)
        scores_V = scores_V[ids]
    weights = scores_V.astype(np.float64)
    weights -= weights.max()
    with np.errstate(over="ignore", under="ignore"):  # near 0, a temperature leaves the likeliest tokens alone
        weights /= settings.temperature
        np.exp(weights, out=weights)
    if settings.top_p < 1:
        kept = _nucleus(scores_V, weights, settings.top_p)
        ids, weights = ids[kept], weights[kept]
    if settings.min_p > 0:
        kept = np.flatnonzero(weights >= settings.min_p * weights.max())
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _nucleus(scores: NDArray[np.floating[Any]], weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Ascending places of the fewest of the highest scores whose weights make up `top_p` of all weights."""
    wanted, size = top_p * weights.sum(), min(_NUCLEUS, len(weights))
    while True:
        cumulative = np.cumsum(np.sort(np.partition(weights, -size)[-size:])[::-1])
        if cumulative[-1] >= wanted or size == len(weights):
            break
        size = len(weights)
    count = min(int(np.searchsorted(cumulative, wanted)) + 1, size)
    last = np.partition(scores, -count)[-count]  # not the last weight, to which other scores may have been rounded
    above, equal = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _above(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
    """Ascending ids of the `count` highest scores and of those that equal the last of them, without those of -inf."""
    threshold = np.partition(scores, -count)[-count] if count < len(scores) else -math.inf
    return np.flatnonzero(scores >= threshold if threshold > -math.inf else scores > threshold)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
