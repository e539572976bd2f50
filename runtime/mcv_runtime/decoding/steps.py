"""The ways to decode, as generators that yield what they want read and are sent logits: logic without a decoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from mcv_runtime.choosing.beams import beam_search
from mcv_runtime.choosing.constraints import Constraint
from mcv_runtime.choosing.prompt_lookup import PromptLookup, looked_up
from mcv_runtime.decoding.completing import PartialCompletion
from mcv_runtime.request.answer import Completion, StopReason
from mcv_runtime.request.options import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Want(NamedTuple):
    """The tokens to read next: `tokens[i]` behind what the request's row `parents[i]` has read so far.

    Every row is sent the logits that follow its last token, but a row with several tokens, which is then the only one, those of
    each. `vain` of its last tokens are forgotten before.
    """

    tokens: Sequence[Sequence[int]]
    parents: Sequence[int] = (0,)
    vain: int = 0


Steps: TypeAlias = "Generator[Want, NDArray[np.float32] | StopReason, list[Completion]]"
"""Begins with a `Want` of nothing, and is sent the logits [1, vocab] behind the prompt. A reason instead of logits: no more."""
PROMPT = Want((), ())


def decoded(completions: Sequence[PartialCompletion], emit: Callable[[str], None]) -> Steps:
    """Greedy or sampled tokens of one completion, or of several to the same prompt; `emit` gets the text of the first."""
    going = list(range(len(completions)))
    parents: list[int] = [0] * len(going)
    want = PROMPT
    while going:
        logits = yield want
        if isinstance(logits, str):
            for index in going:
                piece = completions[index].end(logits)
                if not index:
                    emit(piece)
            break
        for place, index in enumerate(going):
            piece = completions[index].choose(logits[place if want is not PROMPT else 0])
            if not index:
                emit(piece)
        left = [place for place, index in enumerate(going) if completions[index].reason is None]
        parents = left if want is not PROMPT else [0] * len(left)
        going = [going[place] for place in left]
        want = Want([completions[index].tokens[-1:] for index in going], parents)
    return [one.completion() for one in completions]


def guessed(completion: PartialCompletion, emit: Callable[[str], None], lookup: PromptLookup, limit: int) -> Steps:
    """The greedy tokens, with guesses from what was said before."""

    def choose(logits_V: NDArray[np.float32]) -> tuple[int, bool]:
        emit(completion.choose(logits_V))
        return completion.tokens[-1], completion.reason is None

    got = yield PROMPT
    if not isinstance(got, str):
        reading = looked_up(got[0], choose, lookup, limit)
        want = next(reading, None)
        while want is not None:
            got = yield Want([want.tokens], vain=want.vain)
            if isinstance(got, str):
                break
            try:
                want = reading.send(got)
            except StopIteration:
                want = None
    if isinstance(got, str):
        emit(completion.end(got))
    return [completion.completion()]


def searched(
    new: Callable[[], PartialCompletion],
    emit: Callable[[str], None],
    settings: Settings,
    limit: int,
    constraint: Constraint | None,
) -> Steps:
    """The best completions of a beam search, best first; of one that had to end early, as far as they are."""
    got = yield PROMPT
    reason: StopReason | None = got if isinstance(got, str) else None
    if isinstance(got, str):
        ended = new()
        ended.end(got)
        return [ended.completion()]
    search = beam_search(
        got[0],
        num_beams=settings.num_beams,
        stop=settings.stop_ids,
        limit=limit,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        repetition_penalty=settings.sampling.repetition_penalty,
        num_return_sequences=settings.num_return_sequences,
        constraint=constraint,
    )
    try:
        step = next(search)
        while True:
            got = yield Want([[token] for token in step.tokens], step.parents)
            if isinstance(got, str):
                reason = got
                step = search.send(None)
            else:
                step = search.send(got)
    except StopIteration as end:
        found = end.value
    completions = []
    for hypothesis in found:
        one = new()
        for token, logprob in zip(hypothesis.tokens, hypothesis.logprobs, strict=True):
            if one.reason is None:
                one.accept(token, logprob)
        one.end("stop" if hypothesis.done else reason or "length")
        completions.append(one.completion(hypothesis.score))
    emit(completions[0].text)
    return completions
