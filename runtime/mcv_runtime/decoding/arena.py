"""Where keys, values and states lie: every tensor of a decoder's cache for several sequences at once, and how it is bound.

Axis 0 of a cache tensor is the sequence, so neighbouring sequences are one piece of memory, which ONNX Runtime reads and writes
where it is. A place for one sequence is a *slot*.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from mcv_runtime.bundle.manifest import CacheEntry
from mcv_runtime.errors import ResourceError
from mcv_runtime.sessions.graphs import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESULT = "logits"
States: TypeAlias = "tuple[NDArray[Any], ...]"
"""A copy of every tensor of fixed size of one slot, in the order of the manifest's entries."""
_BINDINGS = 32
"""Bindings that are kept: one for each range of slots that runs together."""


class Arena(Protocol):
    """Memory for `slots` sequences of up to `capacity` tokens; one thread at a time may use it."""

    entries: Sequence[CacheEntry]
    slots: int
    capacity: int
    widest: int
    """Most slots of one run."""

    def binding(self, session: Session, first: int, end: int) -> Any:
        """For one run of the slots `first` to `end`: past and present bound, inputs and logits not.

        The run writes states over those it reads: until it has ended, and where it fails, they are of no use.
        """
        ...

    def copy(self, source: int, target: int, start: int, length: int) -> int:
        """Copy tokens `start` to `length` of a slot, and its states, to another one; bytes copied."""
        ...

    def read(self, slot: int, entry: CacheEntry, length: int) -> NDArray[Any]:
        """One tensor of a slot as far as it holds `length` tokens: a copy."""
        ...

    def write(self, slot: int, entry: CacheEntry, values: NDArray[Any], length: int) -> None:
        """The reverse of `read`."""
        ...

    def clear(self, slot: int) -> None:
        """Make the states of a slot those of an empty sequence."""
        ...

    def release(self, slot: int) -> None:
        """Give the slot's memory back to the system, as far as that is possible."""
        ...

    def unbind(self) -> None:
        """Let go of the session that has run last."""
        ...

    def resize(self, slots: int, capacity: int, lengths: Mapping[int, int]) -> int:
        """Room for more, keeping of each slot in `lengths` so many tokens and its states; bytes copied."""
        ...


def token_bytes(entries: Sequence[CacheEntry]) -> int:
    """Bytes that a token takes in what grows."""
    return sum(_bytes(entry) for entry in entries if entry.grows)


def state_bytes(entries: Sequence[CacheEntry]) -> int:
    """Bytes of a sequence's states of fixed size."""
    return sum(_bytes(entry) for entry in entries if not entry.grows)


class HostArena:
    """An arena in the machine's memory, of which only what was written to takes any.

    Keys, values and states are written where they are read. ONNX Runtime's operators for the CPU allow it: attention appends,
    and a gated delta net would else copy its state in one thread before it updates the copy, which takes twice as long as that.
    """

    widest = 1 << 30

    def __init__(self, entries: Sequence[CacheEntry], slots: int, capacity: int) -> None:
        self.entries, self.slots, self.capacity = entries, slots, capacity
        self._session: Session | None = None
        self._bindings: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._buffers = [_Reserved(_shape(entry, slots, capacity), entry.dtype) for entry in entries]

    def binding(self, session: Session, first: int, end: int) -> Any:
        import onnxruntime as ort

        if session is not self._session:  # another one was opened since
            self.unbind()
            self._session = session
        if (first, end) in self._bindings:
            self._bindings.move_to_end((first, end))
            return self._bindings[first, end]
        binding = session.io_binding()
        binding.bind_output(RESULT, "cpu")  # first, so that it is output 0
        for entry, buffer in zip(self.entries, self._buffers, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(buffer.array[first:end])
            binding.bind_ortvalue_input(entry.input, value)
            binding.bind_ortvalue_output(entry.output, value)
        self._bindings[first, end] = binding
        if len(self._bindings) > _BINDINGS:
            self._bindings.popitem(last=False)
        return binding

    def copy(self, source: int, target: int, start: int, length: int) -> int:
        copied = 0
        for entry in self.entries:
            to = self._view(target, entry, start, length)
            to[...] = self._view(source, entry, start, length)
            copied += to.nbytes
        return copied

    def read(self, slot: int, entry: CacheEntry, length: int) -> NDArray[Any]:
        return self._view(slot, entry, 0, length).copy()

    def write(self, slot: int, entry: CacheEntry, values: NDArray[Any], length: int) -> None:
        self._view(slot, entry, 0, length)[...] = values

    def clear(self, slot: int) -> None:
        for entry in self.entries:
            if not entry.grows:
                self._view(slot, entry, 0, 0)[...] = 0

    def release(self, slot: int) -> None:
        for buffer in self._buffers:
            buffer.release(slot)

    def unbind(self) -> None:
        self._bindings.clear()
        self._session = None

    def resize(self, slots: int, capacity: int, lengths: Mapping[int, int]) -> int:
        self._bindings.clear()
        copied = 0
        for number, entry in enumerate(self.entries):  # one by one, so that no two of all are there
            new = _Reserved(_shape(entry, slots, capacity), entry.dtype)
            for slot, length in lengths.items():
                part = _part(entry, 0, length) if entry.grows else ...
                new.array[slot][part] = self._buffers[number].array[slot][part]
                copied += new.array[slot][part].nbytes
            self._buffers[number] = new
        self.slots, self.capacity = slots, capacity
        return copied

    def _view(self, slot: int, entry: CacheEntry, start: int, end: int) -> NDArray[Any]:
        row: NDArray[Any] = self._buffers[self.entries.index(entry)].array[slot]
        return row[_part(entry, start, end)] if entry.grows else row


class _Reserved:
    """An array of zeros, of which only the pages that are written to take memory."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        count = int(np.prod(shape))
        size = count * np.dtype(dtype).itemsize
        try:
            self._memory = mmap.mmap(-1, max(size, 1))
        except (OSError, ValueError, OverflowError) as error:
            raise ResourceError(f"the system gives no address space for {size / 1e6:,.0f} MB of keys and values") from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else a token may take two megabytes a tensor
            with suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: NDArray[Any] = np.frombuffer(self._memory, dtype, count).reshape(shape)

    def release(self, row: int) -> None:
        """Give back the pages that hold nothing but one row of axis 0."""
        size = self.array[0].nbytes
        start = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)


class DeviceArena:
    """An arena in the memory of an execution provider's device, where a sequence is bound once and stays.

    ONNX Runtime's values on a device cannot be cut, so every slot has tensors of its own, sequences run one by one, and what
    is copied goes through the machine's memory. States have two buffers, which swap with each run: not all of a device's
    operators write where they read.
    """

    widest = 1

    def __init__(self, entries: Sequence[CacheEntry], slots: int, capacity: int, device: str, device_id: int = 0) -> None:
        self.entries, self.slots, self.capacity = entries, slots, capacity
        self._turns = [0] * slots
        self._device = (device, device_id)
        self._values: list[list[list[Any]] | None] = [None] * slots
        self._session: Session | None = None
        self._bindings: dict[tuple[int, int], Any] = {}

    def binding(self, session: Session, first: int, end: int) -> Any:
        assert end == first + 1, "slots on a device run one by one"
        if session is not self._session:
            self.unbind()
            self._session = session
        turn = self._turns[first]
        if (first, turn) not in self._bindings:
            binding = session.io_binding()
            binding.bind_output(RESULT, "cpu")
            for entry, values in zip(self.entries, self._slot(first), strict=True):
                binding.bind_ortvalue_input(entry.input, values[0 if entry.grows else turn])
                binding.bind_ortvalue_output(entry.output, values[0 if entry.grows else 1 - turn])
            self._bindings[first, turn] = binding
        self._turns[first] = 1 - turn
        return self._bindings[first, turn]

    def copy(self, source: int, target: int, start: int, length: int) -> int:
        copied = 0
        for entry in self.entries:
            values = self.read(source, entry, length)
            self.write(target, entry, values, length)
            copied += values.nbytes
        return copied

    def read(self, slot: int, entry: CacheEntry, length: int) -> NDArray[Any]:
        whole: NDArray[Any] = self._value(slot, entry).numpy()[0]
        return whole[_part(entry, 0, length)].copy() if entry.grows else whole.copy()

    def write(self, slot: int, entry: CacheEntry, values: NDArray[Any], length: int) -> None:
        value = self._value(slot, entry)
        whole = np.zeros(_shape(entry, 1, self.capacity), entry.dtype)
        whole[0][_part(entry, 0, length) if entry.grows else ...] = values
        value.update_inplace(whole)

    def clear(self, slot: int) -> None:
        for entry in self.entries:
            if not entry.grows:
                self._value(slot, entry).update_inplace(np.zeros(_shape(entry, 1, self.capacity), entry.dtype))

    def release(self, slot: int) -> None:
        self._values[slot] = None
        for turn in (0, 1):
            self._bindings.pop((slot, turn), None)

    def unbind(self) -> None:
        self._bindings.clear()
        self._session = None

    def resize(self, slots: int, capacity: int, lengths: Mapping[int, int]) -> int:
        kept = {slot: [self.read(slot, entry, length) for entry in self.entries] for slot, length in lengths.items()}
        self._bindings.clear()
        self._turns = [0] * slots
        self.slots, self.capacity, self._values = slots, capacity, [None] * slots
        for slot, tensors in kept.items():
            for entry, values in zip(self.entries, tensors, strict=True):
                self.write(slot, entry, values, lengths[slot])
        return sum(values.nbytes for tensors in kept.values() for values in tensors)

    def _value(self, slot: int, entry: CacheEntry) -> Any:
        return self._slot(slot)[self.entries.index(entry)][0 if entry.grows else self._turns[slot]]

    def _slot(self, slot: int) -> list[list[Any]]:
        values = self._values[slot]
        if values is None:
            values = [[self._new(entry) for _ in range(1 if entry.grows else 2)] for entry in self.entries]
            self._values[slot] = values
        return values

    def _new(self, entry: CacheEntry) -> Any:
        import onnxruntime as ort

        shape = _shape(entry, 1, self.capacity)
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(entry.dtype).type, *self._device)


ArenaFactory: TypeAlias = Callable[[Sequence[CacheEntry], int, int], Arena]
"""(entries, slots, capacity) to an arena."""


def _shape(entry: CacheEntry, slots: int, capacity: int) -> list[int]:
    axes = {"batch": slots, "cache_length": capacity}
    return [axes[axis] if isinstance(axis, str) else axis for axis in entry.shape]


def _bytes(entry: CacheEntry) -> int:
    return int(np.prod(_shape(entry, 1, 1))) * np.dtype(entry.dtype).itemsize


def _part(entry: CacheEntry, start: int, end: int) -> tuple[slice, ...]:
    """Where one slot's tensor holds the tokens `start` to `end`."""
    return (*(slice(None),) * (entry.shape.index("cache_length") - 1), slice(start, end))
