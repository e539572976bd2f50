"""What a decoder remembers of sequences: keys and values in one buffer per tensor, allocated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.bundle.manifest import CacheEntry
from mcv_runtime.sessions.graphs import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESULT = "logits"
States = tuple["NDArray[Any]", ...]
"""A copy of every tensor of fixed size, in the order of the manifest's entries."""


class KVCache:
    """Room for `capacity` tokens of each of `rows` sequences; nothing is copied between steps.

    What grows is bound both as past and as present: GroupQueryAttention writes a step's keys and values behind the old ones.
    A state of fixed size has two buffers that swap their roles with each step, as a graph may not overwrite what it reads.
    One thread at a time may use a cache.
    """

    def __init__(self, session: Session, entries: Sequence[CacheEntry], capacity: int, rows: int = 1) -> None:
        self.capacity, self.rows = capacity, rows
        self.lengths = np.zeros(rows, np.int64)
        """Tokens seen so far, by row."""
        self.shifts = np.zeros(rows, np.int64)
        """What a new token's position is ahead of its index, by row."""
        self._session, self._entries = session, entries
        self._buffers = {entry.input: _buffers(entry, rows, capacity) for entry in entries}
        self._bindings = _bindings(session, entries, self._buffers)
        self._turn = 0
        self._spare: KVCache | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def rewindable(self) -> bool:
        """Whether earlier tokens can be gone back to without a saved state."""
        return all(entry.grows for entry in self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that hold something: what is only reserved takes no memory."""
        used = 0
        for entry in self._entries:
            buffer = self._current(entry)
            used += buffer.nbytes * self.length // self.capacity if entry.grows else buffer.nbytes
        return used

    def advance(self, tokens: int, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run the decoder on the next `tokens` tokens of every row and return its logits [wanted, vocab]."""
        binding = self._bindings[self._turn % len(self._bindings)]
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output(RESULT, "cpu")  # anew: else the next run writes into the last result, whatever its shape
        self._session.run_with_iobinding(binding)
        self.lengths += tokens
        self._turn += 1
        outputs = binding.get_outputs_as_ortvaluevector()  # owns the memory of the array below, so that is copied
        logits: NDArray[np.float32] = outputs[0].numpy().copy()
        return logits

    def states(self) -> States:
        """What `rewind` needs to come back to this point later; empty where everything grows."""
        return tuple(self._current(entry).copy() for entry in self._entries if not entry.grows)

    def rewind(self, length: int, states: States = ()) -> None:
        """Forget all but the first `length` tokens of the only row; `states` are those of that moment."""
        assert self.rows == 1 and length <= self.length
        fixed = [entry for entry in self._entries if not entry.grows]
        for entry, state in zip(fixed, states, strict=True):
            self._current(entry)[...] = state
        self.lengths[0] = length

    def gathered(self, rows: Sequence[int], capacity: int | None = None) -> KVCache:
        """A copy of some rows, in that order, perhaps with another capacity."""
        return KVCache.joined([(self, row) for row in rows], capacity or self.capacity)

    @staticmethod
    def joined(sources: Sequence[tuple[KVCache, int]], capacity: int) -> KVCache:
        """A cache whose rows are copies of rows of others."""
        first = sources[0][0]
        cache = KVCache(first._session, first._entries, capacity, len(sources))
        for row, (source, source_row) in enumerate(sources):
            cache._copy(row, source, source_row)
        return cache

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was, copying what is in use once."""
        if list(rows) == list(range(self.rows)):
            return
        spare = self._spare or KVCache(self._session, self._entries, self.capacity, self.rows)
        for row, source_row in enumerate(rows):
            spare._copy(row, self, source_row)
        for name in ("lengths", "shifts", "_buffers", "_bindings", "_turn"):
            mine = getattr(self, name)
            setattr(self, name, getattr(spare, name))
            setattr(spare, name, mine)
        self._spare = spare

    def tensor(self, name: str) -> NDArray[Any]:
        """A copy of what the next step reads as its input `name`."""
        return self._current(next(entry for entry in self._entries if entry.input == name)).copy()

    def export(self) -> dict[str, NDArray[Any]]:
        """What is remembered of the only row, by the name of the input."""
        assert self.rows == 1
        return {entry.input: _used(entry, self._current(entry)[0], self.length).copy() for entry in self._entries}

    def restore(self, tensors: Mapping[str, NDArray[Any]], length: int, shift: int) -> None:
        """Take over what `export` gave; raises `ValueError` or `KeyError` where it does not fit."""
        for entry in self._entries:
            room = _used(entry, self._current(entry)[0], length)
            given = tensors[entry.input]
            if (given.shape, given.dtype) != (room.shape, room.dtype):
                raise ValueError(f"{entry.input} is {given.dtype} {given.shape} instead of {room.dtype} {room.shape}")
            room[...] = given
        self.lengths[0], self.shifts[0] = length, shift

    def _current(self, entry: CacheEntry) -> NDArray[Any]:
        """What the next step reads, not copied."""
        buffers = self._buffers[entry.input]
        return buffers[self._turn % len(buffers)].array

    def _copy(self, row: int, source: KVCache, source_row: int) -> None:
        length = int(source.lengths[source_row])
        for entry in self._entries:
            target = _used(entry, self._current(entry)[row], length)
            target[...] = _used(entry, source._current(entry)[source_row], length)
        self.lengths[row], self.shifts[row] = length, source.shifts[source_row]


class _Buffer:
    """A numpy array and the same memory as ONNX Runtime's value, which only borrows it: both live equally long."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        import onnxruntime as ort

        self.array = np.zeros(shape, dtype)
        self.value = ort.OrtValue.ortvalue_from_numpy(self.array)


def _buffers(entry: CacheEntry, rows: int, capacity: int) -> list[_Buffer]:
    axes = {"batch": rows, "cache_length": capacity}
    shape = [axes[axis] if isinstance(axis, str) else axis for axis in entry.shape]
    return [_Buffer(shape, entry.dtype) for _ in range(1 if entry.grows else 2)]


def _bindings(session: Session, entries: Sequence[CacheEntry], buffers: Mapping[str, list[_Buffer]]) -> list[Any]:
    """What to run in turn: one binding, or two where states swap their buffers."""
    turns = 1 if all(entry.grows for entry in entries) else 2
    bindings = [session.io_binding() for _ in range(turns)]
    for turn, binding in enumerate(bindings):
        binding.bind_output(RESULT, "cpu")  # first, so that it is output 0
        for entry in entries:
            mine = buffers[entry.input]
            binding.bind_ortvalue_input(entry.input, mine[turn % len(mine)].value)
            binding.bind_ortvalue_output(entry.output, mine[(turn + 1) % len(mine)].value)
    return bindings


def _used(entry: CacheEntry, row: NDArray[Any], length: int) -> NDArray[Any]:
    """The part of one row's tensor that holds `length` tokens."""
    if not entry.grows:
        return row
    axis = entry.shape.index("cache_length") - 1
    return row[(slice(None),) * axis + (slice(0, length),)]
