"""Beam search: keep the likeliest beginnings of an answer, and of the finished ones the best.

The rules are those of the reference's generation (transformers 4.51, unchanged in 5): see each comment.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from mcv_runtime.choosing.constraints import Constraint
from mcv_runtime.choosing.sampling import likeliest, penalised
from mcv_runtime.errors import OptionError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished answer: its tokens, a stop token included, and the sum of their log-probabilities / length**length_penalty.

    The log-probabilities are those after the repetition penalty, which multiplies them.
    """

    tokens: tuple[int, ...]
    score: float
    logprobs: tuple[float, ...]
    """Of each token under the model, before any penalty."""
    done: bool
    """Whether it ends by itself, by a stop token or a constraint."""


@dataclass(frozen=True, slots=True)
class _Beam:
    """A beginning of an answer; `row` is its parent among the rows of the last step."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    row: int
    constraint: Constraint | None
    done: bool

    def hypothesis(self, length_penalty: float) -> Hypothesis:
        return Hypothesis(self.tokens, self.total / len(self.tokens) ** length_penalty, self.logprobs, self.done)


class NextStep(NamedTuple):
    """What a search wants read: row i is row `parents[i]` of the step before (at first, the prompt) and `tokens[i]`."""

    parents: list[int]
    tokens: list[int]


def beam_search(
    first_logits_V: NDArray[np.float32],
    *,
    num_beams: int,
    stop: frozenset[int],
    limit: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    constraint: Constraint | None = None,
) -> Generator[NextStep, NDArray[np.float32] | None, list[Hypothesis]]:
    """The best answers of up to `limit` tokens, best first.

    Yields what shall be read and is sent the logits [rows, vocab] of what follows, or None where there is no more time: then
    unfinished answers count too, as far as they are.
    `early_stopping`: True ends with the first `num_beams` finished answers, False when the best beam, as long as it is now,
    is worse than all of them, "never" when it is worse whatever may follow. One beam with True is greedy decoding.
    `constraint` rules tokens out without changing the scores of the others.
    """
    if num_beams < 1:
        raise OptionError(f"num_beams must be at least 1, not {num_beams}")
    if early_stopping not in (True, False, "never"):
        raise OptionError(f'early_stopping must be True, False or "never", not {shown(early_stopping)}')
    if not 1 <= num_return_sequences <= num_beams:
        raise OptionError(f"num_return_sequences must be from 1 to num_beams={num_beams}, not {num_return_sequences}")
    width = max(2, 1 + len(stop)) * num_beams  # so that enough unfinished ones are among them
    running = [_Beam((), (), 0.0, 0, constraint, False)]
    finished: list[Hypothesis] = []
    logits_BV: NDArray[np.float32] | None = first_logits_V[None]
    for length in range(1, limit + 1):
        assert logits_BV is not None
        found = _continuations(running, logits_BV, width, repetition_penalty)
        for rank, beam in enumerate(found):
            found[rank] = beam = _advanced(beam, stop)
            # the others are only there to go on from
            if rank < num_beams and (beam.done or length == limit):
                finished.append(beam.hypothesis(length_penalty))
        finished = sorted(finished, key=lambda one: -one.score)[:num_beams]  # stable: of equal ones the earlier stays
        running = [beam for beam in found if not beam.done][:num_beams]
        if length == limit or not running:
            break
        if len(finished) == num_beams:
            hypothetical = limit if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or running[0].total / hypothetical**length_penalty <= finished[-1].score:
                break
        logits_BV = yield NextStep([beam.row for beam in running], [beam.tokens[-1] for beam in running])
        if logits_BV is None:
            finished += [beam.hypothesis(length_penalty) for beam in running]
            finished.sort(key=lambda one: -one.score)
            break
    return finished[:num_return_sequences]


def _continuations(
    running: Sequence[_Beam], logits_BV: NDArray[np.float32], width: int, repetition_penalty: float
) -> list[_Beam]:
    """The `width` best beams that are one token longer, best first; their constraints have not seen that token yet."""
    best: list[tuple[float, int, int]] = []
    logprobs_BV = [_log_softmax(logits_V) for logits_V in logits_BV[: len(running)]]
    for row, beam in enumerate(running):
        scores_V = penalised(logprobs_BV[row], beam.tokens, repetition_penalty)
        if beam.constraint is not None:
            scores_V = beam.constraint.mask(scores_V)
        found = likeliest(scores_V, width, logits_BV[row])
        best += [(beam.total + float(scores_V[token]), row, int(token)) for token in found]
    best.sort(key=lambda one: -one[0])  # stable: of equal ones the earlier row, and in a row the likelier token
    return [
        _Beam(
            (*running[row].tokens, token),
            (*running[row].logprobs, float(logprobs_BV[row][token])),
            total,
            row,
            running[row].constraint,
            False,
        )
        for total, row, token in best[:width]
    ]


def _advanced(beam: _Beam, stop: frozenset[int]) -> _Beam:
    """The beam with a constraint of its own, and whether its last token ends it."""
    token, constraint = beam.tokens[-1], beam.constraint
    if constraint is not None:
        constraint = constraint.fork()
        constraint.advance(token)
    done = token in stop or (constraint is not None and constraint.done)
    return replace(beam, constraint=constraint, done=done)


def _log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted: NDArray[np.float32] = logits_V - logits_V.max()
    shifted -= np.float32(math.log(np.exp(shifted).sum(dtype=np.float64)))
    return shifted
