"""How much of a prompt to read at once: by time, as this machine has read before."""

from __future__ import annotations

_BESIDE_S, ALONE_S = 0.4, 4.0
"""How long a piece may take: while others wait for their next token, and while nobody does."""
_TELLING = 64
"""Tokens of a piece that shows how fast this machine reads."""
_SMALLEST = 16


class PromptPace:
    """Learns from the pieces that were read how long the next one may be."""

    def __init__(self) -> None:
        self.token_s: float | None = None
        """Seconds that a token takes; None: nothing is known yet."""

    def tokens(self, most: int, *, beside: bool) -> int:
        """Tokens to read now, up to `most`; `beside`: others wait for their next token."""
        if self.token_s is None:
            return min(_TELLING, most)
        fit = int((_BESIDE_S if beside else ALONE_S) / self.token_s)
        return max(min(fit // _SMALLEST * _SMALLEST, most), min(_SMALLEST, most))

    def note(self, tokens: int, seconds: float) -> None:
        """So many were read in so long."""
        token_s = seconds / tokens
        if tokens >= _TELLING or token_s < (self.token_s or 0):  # of a short piece, most is reading the weights
            self.token_s = token_s
