"""An answer in the making: it chooses its tokens, keeps its text and knows when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.choosing.constraints import Constraint
from mcv_runtime.choosing.sampling import Sampler
from mcv_runtime.choosing.stop_strings import StopStrings
from mcv_runtime.request.answer import Completion, StopReason
from mcv_runtime.request.options import Settings
from mcv_runtime.text.tokens import AnswerText, TextTokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Row:
    """One answer; of several to one prompt, number `index`."""

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
        self._logprobs: list[float] = []

    def choose(self, logits: NDArray[np.float32]) -> str:
        """Take the next token from `logits` [vocab]; the text that may be given out now."""
        allowed = logits if self._constraint is None else self._constraint.mask(logits)
        token = self._sampler.draw(allowed, self.tokens)
        if self._constraint is not None:
            self._constraint.advance(token)
        if self._settings.logprobs:
            self._logprobs.append(log_probability(logits, token))
        return self.accept(token)

    def accept(self, token: int) -> str:
        """Take `token`, whoever chose it."""
        self.tokens.append(token)
        piece = self._stops.push(self._visible.push(token))
        if token in self._settings.stop_ids or self._stops.reached or (self._constraint is not None and self._constraint.done):
            self.reason = "stop"
        elif len(self.tokens) == self._limit:
            self.reason = "length"
        if self.reason is not None:
            piece += self._rest()
        self.text += piece
        return piece

    def end(self, reason: StopReason) -> str:
        """Stop here, because of something else than the text."""
        if self.reason is not None:
            return ""
        self.reason = reason
        piece = self._rest()
        self.text += piece
        return piece

    def add_logprobs(self, logprobs: list[float]) -> None:
        """Those of tokens that were accepted."""
        self._logprobs += logprobs

    def completion(self, score: float | None = None) -> Completion:
        assert self.reason is not None
        logprobs = tuple(self._logprobs) if self._settings.logprobs else None
        return Completion(text=self.text, tokens=tuple(self.tokens), stop_reason=self.reason, logprobs=logprobs, score=score)

    def _rest(self) -> str:
        return self._stops.push(self._visible.finish()) + self._stops.finish()


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Of `token` under the model: log-softmax in float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
