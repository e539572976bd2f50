"""Prompt lookup: guess an answer's next tokens from what was said before, and read them at once.

An answer that quotes (text read off a picture, an edited passage) repeats what the prompt or the answer has said; where the
model agrees with a guess, one step of the decoder gives several tokens. The tokens are those of greedy decoding either way.
The idea: Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIRST_DRAFT = 4
_LONGEST_PAUSE = 64


class NextRead(NamedTuple):
    """Tokens that shall be read, after forgetting the last `vain` of those read before."""

    tokens: list[int]
    vain: int


class PromptLookup:
    """The tokens so far, where each short run of them occurred last, and how well guesses went.

    `longest` is the length of the runs that are looked for first, `count` the most tokens of a guess. Guesses get longer while
    all of one is right, and pause for a while when they are wrong, as reading tokens in vain takes time.
    """

    def __init__(self, history: Sequence[int], *, longest: int = 3, count: int = 10) -> None:
        self.drafted = 0
        """Tokens guessed."""
        self.accepted = 0
        """Of these, right ones."""
        self._longest, self._count = longest, count
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        """Where the token behind the last occurrence of a run is."""
        self._size, self._pause, self._waiting = min(_FIRST_DRAFT, count), 1, 0
        for token in history:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token."""
        tokens, end = self._tokens, len(self._tokens)
        for size in range(1, min(self._longest, end) + 1):
            self._follows[tuple(tokens[end - size :])] = end
        tokens.append(token)

    def draft(self, most: int | None = None) -> list[int]:
        """Tokens that may come next, up to `most`: what followed the same tokens the last time; empty if nothing did."""
        if self._waiting:
            self._waiting -= 1
            return []
        return self.guess(self._size if most is None else min(self._size, most))

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest known run at the end, however guesses went so far."""
        for size in range(min(self._longest, len(self._tokens)), 0, -1):
            start = self._follows.get(tuple(self._tokens[-size:]))
            if start is not None:
                return self._tokens[start : start + count]
        return []

    def note(self, drafted: int, accepted: int) -> None:
        """How many tokens of a draft were right."""
        self.drafted += drafted
        self.accepted += accepted
        if accepted == drafted:
            self._size, self._pause = min(2 * self._size, self._count), 1
        elif accepted:
            self._size, self._pause = max(accepted, 1), 1
        else:
            self._size, self._waiting = max(self._size // 2, 1), self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def looked_up(
    first_logits_V: NDArray[np.float32],
    choose: Callable[[NDArray[np.float32]], tuple[int, bool]],
    lookup: PromptLookup,
    limit: int,
) -> Generator[NextRead, NDArray[np.float32] | None, None]:
    """Greedy decoding with guesses: yields what shall be read and is sent the logits [tokens, vocab] of what follows each.

    `choose` takes an answer's next token from logits [vocab] and says whether more may follow. `lookup` knows the prompt and is
    told the answer. Sent None, there is no more time. In the end exactly what greedy decoding would have read was read, all but
    the last token: a last `NextRead` without tokens forgets the rest.
    """

    made, vain = 0, 0

    def chosen(logits_V: NDArray[np.float32]) -> tuple[int, bool]:
        nonlocal made
        token, more = choose(logits_V)
        made += 1
        lookup.append(token)
        return token, more

    token, more = chosen(first_logits_V)
    while more:
        guesses = lookup.draft(limit - made - 1)
        logits = yield NextRead([token, *guesses], vain)
        if logits is None:
            return
        right, vain = 0, len(guesses)
        token, more = chosen(logits[0])
        while right < len(guesses) and token == guesses[right]:
            right += 1
            if not more:  # a guess that ends the answer is right, but greedy decoding never reads it
                break
            vain -= 1
            token, more = chosen(logits[right])
        if guesses:
            lookup.note(len(guesses), right)
    if vain:
        yield NextRead([], vain)
