"""Answers: their texts, and what it took to make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.picture import Picture
from mcv_runtime.text.grounding import Region, find_regions

StopReason = Literal["stop", "length", "repetition", "timeout", "cancelled"]
Phase = Literal["preprocess", "vision", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds: opening the bundle (once, not per request), cutting pictures and tokenizing, and in the graphs."""

    load: float = 0.0
    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    """In steps that this request shared with others, the whole of them."""
    longest_gap: float = 0.0
    """The longest time between two of its tokens, whatever else was done meanwhile."""


TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]
"""The likeliest tokens of a place and their log-probabilities, the likeliest first."""


class Piece(str):
    """A piece of an answer's text that knows its tokens: those since the piece before, some of which may have no text."""

    __slots__ = ("logprobs", "tokens", "top_logprobs")
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Empty unless asked for."""
    top_logprobs: tuple[TopLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One text that a model made of a prompt."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids, the stop token included."""
    stop_reason: StopReason
    """`stop`: the model or a stop string ended the answer; `length`: it ran into max_new_tokens or the end of the context;
    `repetition`: it said one thing over and over, see `repeat_guard`; `timeout` and `cancelled`: this is how far it came."""
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each token under the model, before penalties and temperature; None unless asked for."""
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    """With top_logprobs: the likeliest tokens of each place."""
    score: float | None = None
    """The rank in a beam search: the sum of the log-probabilities over a power of the length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Completion):
    """A finished answer: the best completion, and what the request took."""

    prompt_tokens: tuple[int, ...]
    """Ids of the prompt, placeholders expanded."""
    pictures: tuple[Picture, ...]
    timings: Timings
    reused_tokens: int = 0
    """Of the prompt, tokens that were known from an earlier request and not read again."""
    drafted: int = 0
    """Tokens that prompt_lookup guessed."""
    accepted: int = 0
    """Of these, right ones."""
    alternatives: tuple[Completion, ...] = ()
    """With num_return_sequences: the other completions."""

    def regions(self, picture: int | None = None) -> tuple[Region, ...]:
        """The places that the text names, in pixels of the upright picture, or on a document's page as `PagePlace.size` counts.

        `picture` says which of several, from 0.
        """
        if picture is None and len(self.pictures) == 1:
            picture = 0
        if picture is None or not 0 <= picture < len(self.pictures):
            raise OptionError(
                f"the answer is about {len(self.pictures)} pictures; say which one, for example regions(picture=0)"
            )
        seen = self.pictures[picture]
        return find_regions(self.text, seen.size if seen.page is None else seen.page.size)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed; None if there was no decoding, as the first token comes from the prefill."""
        made = sum(max(len(one.tokens) - 1, 0) for one in (self, *self.alternatives))
        return made / self.timings.decode if self.timings.decode and made else None
