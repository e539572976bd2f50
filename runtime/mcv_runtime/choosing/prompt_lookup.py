"""Prompt lookup: guess an answer's next tokens from what was said before, and read them at once.

An answer that quotes (text read off a picture, an edited passage) repeats what the prompt or the answer has said; where the
model agrees with a guess, one step of the decoder gives several tokens. The tokens are those of greedy decoding either way.
The idea: Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from mcv_runtime.choosing.sampling import penalised

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIRST_DRAFT = 4
_LONGEST_PAUSE = 64


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


def lookup_greedy(
    first_logits_V: NDArray[np.float32],
    read: Callable[[list[int]], NDArray[np.float32]],
    rewind: Callable[[int], None],
    *,
    lookup: PromptLookup,
    stop: frozenset[int],
    limit: int,
    repetition_penalty: float = 1.0,
) -> Generator[int, None, None]:
    """Yield what greedy decoding would, until a stop id (which is yielded too) or `limit` tokens.

    `read` reads tokens behind those before and gives the logits [tokens, vocab] of what follows each; `rewind(n)` forgets the
    last n of them, never all. `lookup` knows the prompt and is told the answer. While this waits at a yield, more of the
    answer may have been read than was yielded; when it has ended or was closed, exactly what greedy decoding would have read:
    all but the last token.
    """
    generated: set[int] = set()

    def choose(logits_V: NDArray[np.float32]) -> int:
        token = int(penalised(logits_V, generated, repetition_penalty).argmax())
        generated.add(token)
        lookup.append(token)
        return token

    token, given = choose(first_logits_V), 1
    yield token
    while token not in stop and given < limit:
        guesses = lookup.draft(limit - given - 1)
        logits = read([token, *guesses])
        chosen = [choose(logits[0])]
        while len(chosen) <= len(guesses) and chosen[-1] == guesses[len(chosen) - 1] and chosen[-1] not in stop:
            chosen.append(choose(logits[len(chosen)]))
        if guesses:
            # nothing is chosen behind a wrong guess, so every pair that agrees is an accepted one
            lookup.note(len(guesses), sum(map(int.__eq__, chosen, guesses)))
        ahead = len(guesses) + 1
        try:
            for token in chosen:
                ahead, given = ahead - 1, given + 1
                yield token
        finally:
            if ahead:
                rewind(ahead)
