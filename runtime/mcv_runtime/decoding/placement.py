"""Bring rows that run together into slots side by side, and their states into the same buffer, with the least copying."""

from __future__ import annotations

from collections.abc import Sequence

from mcv_runtime.decoding.arena import Arena
from mcv_runtime.decoding.row import Row


def side_by_side(arena: Arena, rows: Sequence[Row], running: Sequence[Row]) -> tuple[list[Row], int]:
    """Those `running` of all `rows`, ordered by slot, as one range of them; and the bytes that were copied for it."""
    copied = _gather(arena, rows, running) + _align(arena, running)
    return sorted(running, key=lambda row: row.slot or 0), copied


def _gather(arena: Arena, rows: Sequence[Row], running: Sequence[Row]) -> int:
    slots = sorted(row.slot for row in running if row.slot is not None)
    count = len(slots)
    if not count or slots[-1] - slots[0] < count:
        return 0
    at = {row.slot: row for row in rows}
    moving = set(slots)

    def cost(first: int) -> int:
        window = range(first, first + count)
        inside = sum(at[slot].length for slot in window if slot in at and slot not in moving)
        return inside + sum(at[slot].length for slot in slots if slot not in window)

    first = min(range(arena.slots - count + 1), key=cost)
    window = range(first, first + count)
    places = (slot for slot in window if slot not in moving)
    return sum(_swap(arena, at[slot], place, at.get(place)) for slot in slots if slot not in window for place in [next(places)])


def _swap(arena: Arena, row: Row, slot: int, other: Row | None) -> int:
    """Move a row to a slot; the `other` that is there takes its place."""
    assert row.slot is not None
    old, before = row.slot, 0 if other is None else other.touched
    aside = [] if other is None else [(entry, arena.read(slot, entry, other.length)) for entry in arena.entries]
    arena.turns[slot] = arena.turns[old]
    copied = arena.copy(old, slot, 0, row.length)
    arena.release(old)
    row.slot, row.touched = slot, max(row.length, before)
    if other is not None:
        other.slot, other.touched = old, other.length
        for entry, values in aside:
            arena.write(old, entry, values, other.length)
            copied += values.nbytes
    return copied


def _align(arena: Arena, running: Sequence[Row]) -> int:
    """Bring the states of all rows into the same buffer: those of the fewest move."""
    fixed = [entry for entry in arena.entries if not entry.grows]
    if not fixed:
        return 0
    turns, copied = arena.turns, 0
    turn = int(2 * sum(int(turns[row.slot]) for row in running) > len(running))
    for row in running:
        assert row.slot is not None
        if turns[row.slot] != turn:
            states = [arena.read(row.slot, entry, row.length) for entry in fixed]
            turns[row.slot] = turn
            for entry, state in zip(fixed, states, strict=True):
                arena.write(row.slot, entry, state, row.length)
                copied += state.nbytes
    return copied
