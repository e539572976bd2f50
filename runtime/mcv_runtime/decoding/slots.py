"""One memory for everything that a decoder has read: what runs, what is being read, and beginnings kept for later requests.

All rows share one budget. `slots` decides who stays, `placement` where rows lie, `arena` how.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.bundle.manifest import CacheEntry
from mcv_runtime.decoding.arena import Arena, ArenaFactory, HostArena, States, state_bytes, token_bytes
from mcv_runtime.decoding.placement import side_by_side
from mcv_runtime.decoding.row import Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SLOTS, _CAPACITY = 32, 4096
"""Of an empty memory, which grows: slots, and tokens in each. What is not written to takes no memory."""


class Slots:
    """The rows of a decoder and the memory they lie in; one thread at a time may use it.

    `limit` bounds the bytes of all rows, `keep_limit` those of rows that nobody uses; the least recently used of these are
    forgotten first.
    """

    def __init__(
        self,
        entries: Sequence[CacheEntry],
        context: int,
        axes: int,
        *,
        limit: int,
        keep_limit: int,
        arena: ArenaFactory = HostArena,
    ) -> None:
        self.limit, self.keep_limit = limit, keep_limit
        self.rewindable = all(entry.grows for entry in entries)
        """Whether earlier tokens can be gone back to without a saved state."""
        self.rows: list[Row] = []
        self.copied = 0
        """Bytes that were copied inside the memory so far."""
        self._entries, self._context, self._axes = tuple(entries), context, axes
        self._fixed = tuple(entry for entry in entries if not entry.grows)
        self._token_bytes, self._state_bytes = token_bytes(entries), state_bytes(entries)
        self._new_arena = arena
        self._arena: Arena | None = None
        self._clock = itertools.count(1)

    @property
    def arena(self) -> Arena:
        if self._arena is None:
            self._arena = self._new_arena(self._entries, _SLOTS, min(_CAPACITY, self._context))
        return self._arena

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, with what the running ones have reserved."""
        return self._bytes(self.rows)

    @property
    def kept_bytes(self) -> int:
        """Bytes of rows that may be forgotten."""
        return self._bytes([row for row in self.rows if row.kept])

    def need(self, tokens: int) -> int:
        """Bytes of a row of so many tokens."""
        return tokens * self._token_bytes + self._state_bytes

    def admit(self, keys: NDArray[np.int64], tokens: int, rows: int, own: Row | None = None) -> Row | None:
        """A row with the longest known beginning of `keys`, and room for `rows` of up to `tokens`; None: not now.

        `own` is the row of the conversation that asks: it goes on in its place, if nobody else goes on from there.
        """
        best, shared = self._longest(keys)
        if own is not None and own.slot is not None and own.kept and self.shared(own, keys) >= shared:
            best, shared = own, self.shared(own, keys)
        take = best is not None and best.kept and shared > 0 and self._may_take(best, shared, own)
        need = rows * self.need(tokens)
        there = self.need(min(tokens, best.touched)) if take and best is not None else 0
        if not self._make_room(need - there, best if shared else None):
            best, shared, take = None, 0, False  # there is no room for it beside what it would begin with
            if not self._make_room(need):
                return None
        if take and best is not None:
            row = best
            row.owners.clear()
            row.kept, row.reserved = False, tokens
            self._reserve(tokens)
            self.rewind(row, shared)
        else:
            row = self._new(tokens, best)
            if best is not None and shared:
                self._copy_beginning(best, row, shared)
        row.used, row.spare = next(self._clock), (rows - 1) * self.need(tokens)
        return row

    def shared(self, row: Row, keys: NDArray[np.int64]) -> int:
        """How many of the first tokens of `keys` are in a row and can be gone on from; never all, as logits need one more."""
        limit = min(keys.shape[1] - 1, row.length)
        differing = np.flatnonzero((keys[:, :limit] != row.keys[:, :limit]).any(axis=0))
        common = int(differing[0]) if len(differing) else limit
        if self.rewindable or common == row.length:
            return common
        return max((length for length in row.checkpoints if length <= common), default=0)

    def rewind(self, row: Row, length: int) -> None:
        """Forget all but the first `length` tokens of a row, where it can be gone back to."""
        if not self.rewindable and (length < row.length or row.broken):
            assert row.slot is not None
            if length:
                self._write_states(row.slot, row.checkpoints[length])
            else:
                self.arena.clear(row.slot)
        row.keys = row.keys[:, :length]
        row.checkpoints = {at: states for at, states in row.checkpoints.items() if at <= length}
        row.broken = False

    def undo(self, row: Row, tokens: int) -> None:
        """Forget the last `tokens`; others of which the states must be made once more are its `again` from then on."""
        length = row.length - tokens
        point = length if self.rewindable else max((at for at in row.checkpoints if at <= length), default=0)
        row.again = [*row.keys[0, point:length].tolist(), *row.again]
        self.rewind(row, point)

    def mend(self, row: Row) -> None:
        """Make a row that a failed or interrupted run has left broken what it was before."""
        if row.broken:
            self.undo(row, row.length - row.before)

    def checkpoint(self, row: Row, *, passing: bool = False) -> None:
        """Make the present length one that can be gone back to: a `passing` one until the next such, or until it is kept."""
        assert row.slot is not None
        if self.rewindable or row.length in row.checkpoints:
            return
        self._forget_passing(row)
        if not self._make_room(self._state_bytes):
            return
        row.checkpoints[row.length] = tuple(self.arena.read(row.slot, entry, row.length) for entry in self._fixed)
        row.passing = row.length if passing else None

    def fork(self, row: Row, tokens: int) -> Row:
        """Another row with the same tokens; there must be room, as `admit` made."""
        row.spare = max(row.spare - self.need(tokens), 0)
        other = self._new(tokens, row)
        self._copy_beginning(row, other, row.length)
        return other

    def replace(self, row: Row, by: Row, common: int) -> None:
        """Make a row what another one is; the first `common` tokens are the same."""
        assert row.slot is not None and by.slot is not None
        self.copied += self.arena.copy(by.slot, row.slot, common, by.length)
        row.keys = by.keys.copy()
        row.touched = max(row.touched, row.length)

    def runs(self, rows: Iterable[Row]) -> None:
        """A run of these begins; until `ran` they are broken."""
        for row in rows:
            row.before, row.broken = row.length, True

    def ran(self, row: Row, keys: NDArray[np.int64]) -> None:
        """A run has read these."""
        row.keys = np.concatenate((row.keys, keys), axis=1)
        row.touched = max(row.touched, row.length)
        row.again = []
        row.broken = False

    def keep(self, row: Row) -> None:
        """Nobody uses a row any more: it stays for later requests, as long as there is room."""
        if row.slot is None:
            return
        self.mend(row)
        self._forget_passing(row)
        row.again = []
        if not row.length or not self.keep_limit:
            self.drop(row)
            return
        row.kept, row.reserved, row.spare, row.used = True, 0, 0, next(self._clock)
        for other in [other for other in self.rows if other.kept and other is not row]:
            if not other.owners and row.begins_with(other):
                self.drop(other)
        while self.kept_bytes > self.keep_limit:
            self._evict(None)

    def drop(self, row: Row) -> None:
        """Forget a row."""
        if row.slot is not None:
            self.arena.release(row.slot)
            self.rows.remove(row)
            row.slot = None

    def unbind(self) -> None:
        """Let go of the session that has run last."""
        if self._arena is not None:
            self._arena.unbind()

    def close(self) -> None:
        """Forget all rows, and let go of their memory and of the session that has run last."""
        for row in self.rows:
            row.slot = None
        self.rows.clear()
        self._arena = None

    def clear(self) -> None:
        """Forget all rows that nobody uses and no conversation goes on from."""
        for row in [row for row in self.rows if row.kept and not row.owners]:
            self.drop(row)

    def ranges(self, rows: Iterable[Row]) -> list[list[Row]]:
        """The rows in groups that run together, ordered by slot: on a host one, its slots side by side, which costs copies."""
        if self.arena.widest == 1:
            return [[row] for row in rows]
        ordered, copied = side_by_side(self.arena, self.rows, list(rows))
        self.copied += copied
        return [ordered]

    def export(self, row: Row) -> Iterator[tuple[str, NDArray[Any]]]:
        """Copies of a row's tensors, one after the other, by the name of the input."""
        assert row.slot is not None
        for entry in self._entries:
            yield entry.input, self.arena.read(row.slot, entry, row.length)

    def restore(
        self, keys: NDArray[np.int64], tensor: Callable[[str], NDArray[Any]], checkpoints: dict[int, States]
    ) -> Row | None:
        """A kept row of what `export` gave, if there is room; raises `ValueError` where it does not fit."""
        length = keys.shape[-1]
        if keys.dtype != np.int64 or keys.ndim != 2 or len(keys) != self._axes or not 0 < length <= self._context:
            raise ValueError(f"keys of {keys.dtype} {keys.shape}")
        for at, states in checkpoints.items():
            if not 0 < at <= length or len(states) != len(self._fixed):
                raise ValueError(f"states after {at} of {length} tokens")
            for entry, state in zip(self._fixed, states, strict=True):
                _check(entry, state, length)
        need = self.need(length) + len(checkpoints) * self._state_bytes
        if need > self.keep_limit or not self._make_room(need):
            return None
        row = self._new(length, None)
        assert row.slot is not None
        try:
            for entry in self._entries:
                values = tensor(entry.input)
                _check(entry, values, length)
                self.arena.write(row.slot, entry, values, length)
        except BaseException:
            self.drop(row)
            raise
        row.keys, row.touched, row.checkpoints = keys, length, checkpoints
        self.keep(row)
        return row

    def _forget_passing(self, row: Row) -> None:
        if row.passing is not None:
            row.checkpoints.pop(row.passing, None)
            row.passing = None

    def _longest(self, keys: NDArray[np.int64]) -> tuple[Row | None, int]:
        if not self.keep_limit:
            return None, 0
        shared = [(self.shared(row, keys), row.kept, row.used, row) for row in self.rows]
        best = max(shared, key=lambda one: one[:3], default=None)
        return (None, 0) if best is None else (best[3], best[0])

    def _may_take(self, row: Row, shared: int, own: Row | None) -> bool:
        """Whether a kept row may be gone on with in its place; what ends otherwise stays: somebody may come back to that."""
        owners = len(row.owners)
        return owners <= 1 if row is own else not owners and shared == row.length

    def _bytes(self, rows: Sequence[Row]) -> int:
        """Bytes that rows take, or may come to take: states that several of them can go back to are there once."""
        checkpoints = {id(states) for row in rows for states in tuple(row.checkpoints.values())}  # others may add one meanwhile
        grown = sum(self.need(max(row.touched, row.reserved)) + row.spare for row in rows)
        return grown + len(checkpoints) * self._state_bytes

    def _make_room(self, bytes_: int, spared: Row | None = None) -> bool:
        if self._bytes([row for row in self.rows if not row.kept or row is spared]) + bytes_ > self.limit:
            return False  # nothing is forgotten in vain
        while self.nbytes + bytes_ > self.limit:
            self._evict(spared)
        return True

    def _evict(self, spared: Row | None) -> bool:
        candidates = [row for row in self.rows if row.kept and row is not spared]
        if not candidates:
            return False
        self.drop(min(candidates, key=lambda row: row.used))
        return True

    def _new(self, tokens: int, beside: Row | None) -> Row:
        self._reserve(tokens)
        taken = {row.slot for row in self.rows}
        free = [slot for slot in range(self.arena.slots) if slot not in taken]
        if not free and self._evict(beside):
            return self._new(tokens, beside)
        if not free:
            slots = self.arena.slots
            self._resize(2 * slots, self.arena.capacity)
            free = list(range(slots, 2 * slots))
        active = [row.slot for row in self.rows if not row.kept and row.slot is not None]
        centre = sum(active) / len(active) if active else 0
        slot = min(free, key=lambda slot: abs(slot - centre))  # near those with which it will run
        row = Row(slot, np.empty((self._axes, 0), np.int64), reserved=tokens)
        self.rows.append(row)
        self.arena.clear(slot)
        return row

    def _reserve(self, tokens: int) -> None:
        capacity = self.arena.capacity
        while capacity < tokens:
            capacity = min(2 * capacity, max(self._context, tokens))
        if capacity > self.arena.capacity:
            self._resize(self.arena.slots, capacity)

    def _resize(self, slots: int, capacity: int) -> None:
        lengths = {row.slot: row.length for row in self.rows if row.slot is not None}
        self.copied += self.arena.resize(slots, capacity, lengths)
        for row in self.rows:
            row.touched = row.length

    def _copy_beginning(self, source: Row, target: Row, length: int) -> None:
        """Copy the first tokens of a row, and the states there, to an empty one."""
        assert source.slot is not None and target.slot is not None
        self.copied += self.arena.copy(source.slot, target.slot, 0, length)
        target.keys = source.keys[:, :length].copy()
        target.touched = length
        target.checkpoints = {at: states for at, states in source.checkpoints.items() if at <= length}
        if not self.rewindable and length < source.length:
            self._write_states(target.slot, source.checkpoints[length])

    def _write_states(self, slot: int, states: States) -> None:
        for entry, state in zip(self._fixed, states, strict=True):
            self.arena.write(slot, entry, state, 0)


def _check(entry: CacheEntry, values: NDArray[Any], length: int) -> None:
    wanted = tuple(length if axis == "cache_length" else axis for axis in entry.shape[1:])
    # NaN would be answered from
    if (values.shape, values.dtype) != (wanted, np.dtype(entry.dtype)) or not np.isfinite(values).all():
        raise ValueError(f"{entry.input} is {values.dtype} {values.shape} instead of finite {entry.dtype} {wanted}")
