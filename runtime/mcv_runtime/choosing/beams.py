"""Beam search: keep the likeliest beginnings of an answer, and of the finished ones the best.

The rules are those of the reference's generation (transformers 4.51, unchanged in 5): see each comment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mcv_runtime.choosing.constraints import Constraint
from mcv_runtime.choosing.sampling import likeliest, penalised
from mcv_runtime.errors import OptionError

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


@dataclass(frozen=True, slots=True)
class _Beam:
    """A beginning of an answer; `row` is its parent among the rows of the last step."""

    tokens: tuple[int, ...]
    total: float
    row: int
    constraint: Constraint | None
    done: bool


def beam_search(
    first_logits_V: NDArray[np.float32],
    step: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
    *,
    num_beams: int,
    stop: frozenset[int],
    limit: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    constraint: Constraint | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Hypothesis]:
    """The best answers of up to `limit` tokens, best first.

    `step(parents, tokens)`, both [num_beams], makes row i what row `parents[i]` was (of the step before; at first all rows are
    the prompt) and adds `tokens[i]` to it; it gives the logits [num_beams, vocab] of what follows. It is always asked for all
    rows: where fewer beams are left, the last ones are copies that nobody reads.
    `early_stopping`: True ends with the first `num_beams` finished answers, False when the best beam, as long as it is now,
    is worse than all of them, "never" when it is worse whatever may follow. One beam with True is greedy decoding.
    `constraint` rules tokens out without changing the scores of the others. What `check` raises before a step ends the search.
    """
    if num_beams < 1:
        raise OptionError(f"num_beams must be at least 1, not {num_beams}")
    if early_stopping not in (True, False, "never"):
        raise OptionError(f'early_stopping must be True, False or "never", not {early_stopping!r}')
    if not 1 <= num_return_sequences <= num_beams:
        raise OptionError(f"num_return_sequences must be from 1 to num_beams={num_beams}, not {num_return_sequences}")
    width = max(2, 1 + len(stop)) * num_beams  # so that enough unfinished ones are among them
    running = [_Beam((), 0.0, 0, constraint, False)]
    finished: list[Hypothesis] = []
    logits_BV = first_logits_V[None]
    for length in range(1, limit + 1):
        found = _continuations(running, logits_BV, width, repetition_penalty)
        for rank, beam in enumerate(found):
            found[rank] = beam = _advanced(beam, stop)
            # the others are only there to go on from
            if rank < num_beams and (beam.done or length == limit):
                finished.append(Hypothesis(beam.tokens, beam.total / length**length_penalty))
        finished = sorted(finished, key=lambda one: -one.score)[:num_beams]  # stable: of equal ones the earlier stays
        running = [beam for beam in found if not beam.done][:num_beams]
        if length == limit or not running:
            break
        if len(finished) == num_beams:
            hypothetical = limit if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or running[0].total / hypothetical**length_penalty <= finished[-1].score:
                break
        check()
        rows = running + [running[0]] * (num_beams - len(running))
        parents, tokens = [beam.row for beam in rows], [beam.tokens[-1] for beam in rows]
        logits_BV = step(np.array(parents, np.int64), np.array(tokens, np.int64))
    return finished[:num_return_sequences]


def _continuations(
    running: Sequence[_Beam], logits_BV: NDArray[np.float32], width: int, repetition_penalty: float
) -> list[_Beam]:
    """The `width` best beams that are one token longer, best first; their constraints have not seen that token yet."""
    best: list[tuple[float, int, int]] = []
    for row, beam in enumerate(running):
        scores_V = penalised(_log_softmax(logits_BV[row]), beam.tokens, repetition_penalty)
        if beam.constraint is not None:
            scores_V = beam.constraint.mask(scores_V)
        found = likeliest(scores_V, width, logits_BV[row])
        best += [(beam.total + float(scores_V[token]), row, int(token)) for token in found]
    best.sort(key=lambda one: -one[0])  # stable: of equal ones the earlier row, and in a row the likelier token
    return [
        _Beam((*running[row].tokens, token), total, row, running[row].constraint, False) for total, row, token in best[:width]
    ]


def _advanced(beam: _Beam, stop: frozenset[int]) -> _Beam:
    """The beam with a constraint of its own, and whether its last token ends it."""
    token, constraint = beam.tokens[-1], beam.constraint
    if constraint is not None:
        constraint = constraint.fork()
        constraint.advance(token)
    done = token in stop or (constraint is not None and constraint.done)
    return _Beam(beam.tokens, beam.total, beam.row, constraint, done)


def _log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted: NDArray[np.float32] = logits_V - logits_V.max()
    shifted -= np.float32(math.log(np.exp(shifted).sum(dtype=np.float64)))
    return shifted
