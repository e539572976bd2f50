"""A row: one sequence in the decoder's memory, and the keys by which another request finds what it has in common with it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.decoding.arena import States
from mcv_runtime.pictures.picture import Picture
from mcv_runtime.text.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray


def prompt_keys(prompt: Prompt, pictures: Sequence[Picture] = ()) -> NDArray[np.int64]:
    """Keys of a prompt's tokens, [1 or 4, tokens]: ids (of visual tokens, which one of which picture), and positions."""
    keys = prompt.ids.copy()
    start = 0
    for picture in pictures:
        places = prompt.visual_positions[start : start + len(picture.embeds)]
        keys[places] = -1 - (int(picture.fingerprint[:14], 16) + np.arange(len(places)))
        start += len(places)
    return keys[None] if prompt.positions is None else np.vstack((keys, prompt.positions))


@dataclass(eq=False, slots=True, weakref_slot=True)
class Row:
    """One sequence in the memory; `slot` is None once it is there no more."""

    slot: int | None
    keys: NDArray[np.int64]
    """As `prompt_keys`, one column for each token that was read."""
    reserved: int = 0
    """Tokens that it may grow to."""
    touched: int = 0
    """Most tokens that its slot has held: what takes memory."""
    before: int = 0
    """Its length before the last run."""
    broken: bool = False
    """A run of it began, and is not known to have ended well."""
    again: list[int] = field(default_factory=list)
    """Tokens that must be read once more before any others, as its states went back to before them."""
    checkpoints: dict[int, States] = field(default_factory=dict)
    """States of fixed size after so many tokens, where the decoder has such: other lengths cannot be gone back to."""
    passing: int | None = None
    """Which of these is for the next run only."""
    used: int = 0
    """When it was used last: the lower, the longer ago."""
    kept: bool = False
    """Nobody runs or reads it: it may be forgotten."""
    spare: int = 0
    """Bytes that are set aside for rows that will be forked from it."""
    owners: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Conversations that go on from here."""

    @property
    def length(self) -> int:
        return int(self.keys.shape[1])

    @property
    def next_position(self) -> int:
        """Of the token that is read next, on every axis."""
        return self.length if len(self.keys) == 1 else int(self.keys[1:].max(initial=-1)) + 1

    def begins_with(self, beginning: Row) -> bool:
        """Whether it holds all that another one does."""
        return np.array_equal(self.keys[:, : beginning.length], beginning.keys)
