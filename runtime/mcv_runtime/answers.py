"""What a request gives back: the answer and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from mcv_runtime.vision import Picture

StopReason = Literal["stop", "length"]
Phase = Literal["preprocess", "vision", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds: opening the bundle (once, not per request), cutting pictures and tokenizing, and in the graphs."""

    load: float = 0.0
    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class Stopwatch:
    """Adds up the time of each phase of a request."""

    def __init__(self, load_s: float) -> None:
        self.timings = Timings(load=load_s)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings = replace(self.timings, **{name: getattr(self.timings, name) + time.perf_counter() - start})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids, the stop token included."""
    prompt_tokens: tuple[int, ...]
    """Ids of the prompt, placeholders expanded."""
    pictures: tuple[Picture, ...]
    timings: Timings
    stop_reason: StopReason
    """`stop`: the model ended its answer; `length`: it ran into max_new_tokens or the end of the context."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed; None if there was no decoding, as the first token comes from the prefill."""
        return (len(self.tokens) - 1) / self.timings.decode if self.timings.decode else None
