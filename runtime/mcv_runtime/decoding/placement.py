"""Bring rows that run together into slots side by side, with the least copying."""

from __future__ import annotations

from collections.abc import Sequence

from mcv_runtime.decoding.arena import Arena
from mcv_runtime.decoding.row import Row


def side_by_side(arena: Arena, rows: Sequence[Row], running: Sequence[Row]) -> tuple[list[Row], int]:
    """Those `running` of all `rows`, ordered by slot, as one range of them; and the bytes that were copied for it."""
    copied = _gather(arena, rows, running)
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
    copied = arena.copy(old, slot, 0, row.length)
    arena.release(old)
    row.slot, row.touched = slot, max(row.length, before)
    if other is not None:
        other.slot, other.touched = old, other.length
        for entry, values in aside:
            arena.write(old, entry, values, other.length)
            copied += values.nbytes
    return copied
