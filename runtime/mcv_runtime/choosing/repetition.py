"""Notice an answer that says one thing over and over, as small models do on long pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_TIMES = 4
"""How often something must be said to be a loop: a table has equal lines, a song three equal verses."""
LEAST_REPEAT_GUARD = 16
"""Tokens; fewer are said over and over in earnest (dots before a page number, a ruled line)."""


class RepeatGuard:
    """Told an answer's tokens one by one, says when the last `tokens` are one piece, at least four times over."""

    def __init__(self, tokens: int) -> None:
        self._window = tokens
        self._runs = np.zeros(tokens // _TIMES, np.int64)
        """At p - 1: how many of the last tokens are what stands p tokens before them."""

    def loops(self, tokens: Sequence[int]) -> bool:
        """Whether all `tokens`, one more than the last time, end in a loop."""
        last, count = tokens[-1], min(len(self._runs), len(tokens) - 1)
        before = np.asarray(tokens[-1 - count : -1], np.int64)[::-1]
        self._runs[:count] = np.where(before == last, self._runs[:count] + 1, 0)
        return bool((self._runs + np.arange(1, len(self._runs) + 1) >= self._window).any())
