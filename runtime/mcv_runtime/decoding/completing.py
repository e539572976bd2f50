"""A completion in the making: it takes its tokens, keeps its text and knows when it is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.choosing.constraints import Constraint
from mcv_runtime.choosing.repetition import RepeatGuard
from mcv_runtime.choosing.sampling import Sampler, likeliest
from mcv_runtime.choosing.stop_strings import StopStrings
from mcv_runtime.errors import RunError
from mcv_runtime.request.answer import Completion, Piece, StopReason, TopLogprobs
from mcv_runtime.request.options import Settings
from mcv_runtime.text.tokens import AnswerText, TextTokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PartialCompletion:
    """One completion of a prompt as far as it is; `hidden` ids never become text."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: TextTokenizer,
        *,
        hidden: frozenset[int],
        limit: int,
        sampler: Sampler,
        constraint: Constraint | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.reason: StopReason | None = None
        self._settings, self._limit = settings, limit
        self._sampler, self._constraint = sampler, constraint
        self._visible = AnswerText(tokenizer, hidden=hidden)
        self._stops = StopStrings(settings.stop)
        self._guard = RepeatGuard(settings.repeat_guard) if settings.repeat_guard else None
        self._logprobs: list[float] = []
        self._top_logprobs: list[TopLogprobs] = []
        self._told = 0
        """Tokens that a piece has told of."""

    def choose(self, logits_V: NDArray[np.float32]) -> str:
        """Take the next token from logits [vocab]; the text that may be given out now."""
        allowed = logits_V if self._constraint is None else self._constraint.mask(logits_V)
        token = self._sampler.draw(allowed, self.tokens)
        if self._constraint is not None:
            self._constraint.advance(token)
        if not self._settings.logprobs:
            return self.accept(token, 0.0)
        best = likeliest(logits_V, self._settings.top_logprobs).tolist() if self._settings.top_logprobs else []
        logprob, *others = log_probabilities(logits_V, [token, *best])
        self._top_logprobs.append(tuple(zip(best, others, strict=True)))
        return self.accept(token, logprob)

    def accept(self, token: int, logprob: float) -> str:
        """Take `token`, whoever chose it, with its log-probability under the model."""
        self.tokens.append(token)
        self._logprobs.append(logprob)
        piece = self._stops.push(self._visible.push(token))
        if token in self._settings.stop_ids or self._stops.reached or (self._constraint is not None and self._constraint.done):
            self.reason = "stop"
        elif len(self.tokens) == self._limit:
            self.reason = "length"
        elif self._guard is not None and self._guard.loops(self.tokens):
            self.reason = "repetition"
        if self.reason is not None:
            piece += self._rest()
        self.text += piece
        return self._piece(piece)

    def end(self, reason: StopReason) -> str:
        """Stop here, because of something else than the text."""
        if self.reason is not None:
            return ""
        self.reason = reason
        piece = self._rest()
        self.text += piece
        return self._piece(piece)

    def completion(self, score: float | None = None) -> Completion:
        """The finished completion."""
        assert self.reason is not None
        return Completion(
            text=self.text,
            tokens=tuple(self.tokens),
            stop_reason=self.reason,
            logprobs=tuple(self._logprobs) if self._settings.logprobs else None,
            top_logprobs=tuple(self._top_logprobs) if self._settings.top_logprobs else None,
            score=score,
        )

    def _piece(self, text: str) -> str:
        if not text:
            return text
        piece, since = Piece(text), slice(self._told, len(self.tokens))
        piece.tokens = tuple(self.tokens[since])
        piece.logprobs = tuple(self._logprobs[since]) if self._settings.logprobs else ()
        piece.top_logprobs = tuple(self._top_logprobs[since])
        self._told = len(self.tokens)
        return piece

    def _rest(self) -> str:
        return self._stops.push(self._visible.finish()) + self._stops.finish()


def log_probabilities(logits_V: NDArray[np.float32], tokens: Sequence[int]) -> list[float]:
    """Of `tokens` under the model: log-softmax in float64."""
    shifted = logits_V.astype(np.float64) - logits_V.max()
    found: list[float] = (shifted[list(tokens)] - np.log(np.exp(shifted).sum())).tolist()
    return found


def check_logits(logits: NDArray[np.float32]) -> None:
    """Raise `RunError` for logits [rows, vocab] that say nothing: NaN, infinity, or all ruled out."""
    best = logits.max(axis=-1, initial=-math.inf)  # NaN wins
    if not np.isfinite(best).all():
        raise RunError("the decoder gave numbers that are none (NaN or infinity); its weights or a picture's are damaged")
