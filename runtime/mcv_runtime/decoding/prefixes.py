"""Not reading the same beginning twice: what was read before, found again by its longest common prefix."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.decoding.cache import KVCache, States
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.pictures.picture import Picture
from mcv_runtime.text.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray


def prompt_keys(prompt: Prompt, pictures: Sequence[Picture]) -> NDArray[np.int64]:
    """What tells the prompt's tokens apart, [1 or 4, tokens]: ids (of visual tokens, which one of which picture), positions."""
    keys = prompt.ids.copy()
    start = 0
    for picture in pictures:
        places = prompt.visual_positions[start : start + len(picture.embeds)]
        keys[places] = -1 - (int(picture.fingerprint[:14], 16) + np.arange(len(places)))
        start += len(places)
    return keys[None] if prompt.positions is None else np.vstack((keys, prompt.positions))


@dataclass(slots=True, eq=False)
class Memory:
    """A sequence that a decoder has read: its keys and its cache."""

    keys: NDArray[np.int64]
    """As `prompt_keys`, one column for each token in the cache."""
    cache: KVCache
    checkpoints: dict[int, States] = field(default_factory=dict)
    """States of fixed size after so many tokens, where the cache has such: other lengths cannot be gone back to."""

    @property
    def nbytes(self) -> int:
        states = sum(array.nbytes for states in self.checkpoints.values() for array in states)
        return self.cache.nbytes + self.keys.nbytes + states

    def shared(self, keys: NDArray[np.int64]) -> int:
        """How many of the first tokens of `keys` are here and can be gone on from; never all, as logits need one more step."""
        if len(keys) != len(self.keys):
            return 0
        limit = min(keys.shape[1] - 1, self.keys.shape[1])
        differing = np.flatnonzero((keys[:, :limit] != self.keys[:, :limit]).any(axis=0))
        common = int(differing[0]) if len(differing) else limit
        if self.cache.rewindable or common == self.cache.length:
            return common
        return max((length for length in self.checkpoints if length <= common), default=0)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length < self.cache.length:
            self.cache.rewind(length, self.checkpoints.get(length, ()))
            # what a position is ahead of its index is known where positions are keys; else the two are equal
            self.cache.shifts[0] = int(self.keys[1:, :length].max(initial=length - 1)) + 1 - length
        self.keys = self.keys[:, :length]
        self.checkpoints = {at: states for at, states in self.checkpoints.items() if at <= length}

    def remember(self, keys: NDArray[np.int64]) -> None:
        """The cache has read these too."""
        self.keys = np.concatenate((self.keys, keys), axis=1)

    def checkpoint(self) -> None:
        """Make the present length one that can be gone back to."""
        if not self.cache.rewindable:
            self.checkpoints[self.cache.length] = self.cache.states()

    def copy(self, length: int, capacity: int) -> Memory:
        """The first `length` tokens once more, with room for `capacity`."""
        cache = self.cache.gathered([0], max(capacity, self.cache.length))
        memory = Memory(self.keys, cache, dict(self.checkpoints))
        memory.rewind(length)
        return memory


def empty_memory(decoder: Decoder, tokens: int, axes: int) -> Memory:
    """Nothing read yet; room for `tokens`, keys of `axes` rows."""
    return Memory(np.empty((axes, 0), np.int64), decoder.new_cache(tokens))


class PrefixCache:
    """What was read for earlier requests, up to a number of bytes, the least recently used forgotten first.

    Threads may share it: what is inside is never changed, only copied or taken out.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._memories: list[Memory] = []  # the most recently used last
        self._lock = threading.Lock()

    def recall(self, keys: NDArray[np.int64], capacity: int, decoder: Decoder) -> Memory:
        """A memory of the longest known beginning of `keys`, the caller's own, with room for `capacity` tokens."""
        with self._lock:
            shared = [memory.shared(keys) for memory in self._memories]
            best = max(range(len(shared)), key=shared.__getitem__, default=None)
            if best is None or not shared[best]:
                return empty_memory(decoder, capacity, len(keys))
            memory, length = self._memories.pop(best), shared[best]
            if length < memory.keys.shape[1]:  # it goes on otherwise: somebody may come back to that
                self._memories.append(memory)
            elif memory.cache.capacity >= capacity:
                memory.rewind(length)
                return memory
        return memory.copy(length, decoder.room(capacity))

    def keep(self, memory: Memory) -> None:
        """Remember a memory that is not used any more."""
        with self._lock:
            if memory.keys.shape[1] and memory.nbytes <= self._limit:
                self._memories = [other for other in self._memories if not _begins_with(memory.keys, other.keys)]
                self._memories.append(memory)
            total = sum(memory.nbytes for memory in self._memories)
            while total > self._limit:
                total -= self._memories.pop(0).nbytes

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._memories.clear()


def _begins_with(keys: NDArray[np.int64], beginning: NDArray[np.int64]) -> bool:
    return len(keys) == len(beginning) and np.array_equal(keys[:, : beginning.shape[1]], beginning)
