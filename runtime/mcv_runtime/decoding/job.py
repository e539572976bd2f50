"""A request inside the scheduler: what is asked, how far it is, and what it has given out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mcv_runtime.choosing.prompt_lookup import PromptLookup
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.steps import PROMPT, Steps, Want
from mcv_runtime.pictures.picture import Picture, SlicedPicture
from mcv_runtime.progress import Event, Progress, Stage
from mcv_runtime.request.answer import Answer, Phase, StopReason, Timings
from mcv_runtime.request.patience import Patience
from mcv_runtime.text.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

Encoding: TypeAlias = Generator[int, None, tuple[Picture, ...]]
"""Encodes pictures a batch of slices at a time, and says how many those were."""


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """One request. Pictures are encoded first, then the prompt is read, then tokens are chosen; without a prompt, only encoded.

    Only who steps the scheduler changes it, but for `cancelled` and `abandoned`, which anybody may set at any time.
    """

    pictures: Sequence[SlicedPicture | Picture]
    patience: Patience
    prompt: Prompt | None = None
    steps: Callable[[Callable[[str], None]], Steps] | None = None
    """Makes the way to decode; is given where text goes."""
    rows_needed: int = 1
    tokens: int = 0
    """Most tokens that a row of it may hold."""
    stops: Sequence[int] = ()
    """Lengths of the prompt that later requests may come back to, its end the last."""
    lookup: PromptLookup | None = None
    """The guesser of its tokens, if there is one: then its row is read by itself, several tokens at a time."""
    chunk: int = 512
    """Most tokens of the prompt that are read at once."""
    own: Row | None = None
    """The row of the conversation that it goes on with."""
    owner: Any = None
    """That conversation."""
    progress: Progress | None = None
    timings: Timings = field(default_factory=Timings)

    # how far it is
    encoding: Encoding | None = None
    encoded: tuple[Picture, ...] | None = None
    keys: NDArray[np.int64] | None = None
    embeds: NDArray[np.float32] | None = None
    crowded_out: bool = False
    """There was no memory for it yet: nobody who came later begins to be read before it."""
    rows: list[Row] = field(default_factory=list)
    reused: int = 0
    deciding: Steps | None = None
    want: Want | None = None
    got: NDArray[np.float32] | None = None
    """Logits that `deciding` has not been sent yet."""
    slices_left: int = 0
    """Slices that are not encoded yet."""
    sent: int = 0
    """How often it was sent logits, and went on."""
    emitted: int = 0
    """Tokens whose text was given out."""
    last_token: float | None = None

    # what it has given out
    pieces: deque[str] = field(default_factory=deque)
    events: deque[Event] = field(default_factory=deque)
    answer: Answer | None = None
    error: BaseException | None = None
    raised: BaseException | None = None
    """By its `progress`."""
    done: bool = False
    cancelled: bool = False
    abandoned: bool = False
    """Nobody will read its answer."""
    given_up: bool = False
    """Whether it was abandoned before it was done."""
    wakers: list[Callable[[], None]] = field(default_factory=list)
    """Called, in any thread, when there may be something new."""

    @property
    def decoding(self) -> bool:
        """Whether its prompt was read."""
        return self.want is not None and self.want is not PROMPT

    def emit(self, piece: str) -> None:
        """Give out a token's text."""
        self.emitted += 1
        if piece:
            self.pieces.append(piece)

    def report(self, stage: Stage, done: int, total: int) -> None:
        """Tell how far it is, whoever asks."""
        if self.progress is not None:
            self.events.append(Event(stage, done, total))

    def took(self, phase: Phase, seconds: float) -> None:
        """So long was worked on it."""
        self.timings = replace(self.timings, **{phase: getattr(self.timings, phase) + seconds})

    def wake(self) -> None:
        """Tell those who wait that there may be something new."""
        for waker in tuple(self.wakers):  # who is woken may leave meanwhile
            waker()

    def note_token(self) -> None:
        """A token was chosen: how long after the one before."""
        now = time.perf_counter()
        if self.last_token is not None:
            self.timings = replace(self.timings, longest_gap=max(self.timings.longest_gap, now - self.last_token))
        self.last_token = now

    def ending(self) -> StopReason | None:
        """Why it shall end now, if it shall."""
        return "cancelled" if self.cancelled or self.abandoned else self.patience.ending
