"""Which pages of a document are meant: `1-3,7`, `5-`, a number, or a list of numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from mcv_runtime.errors import OptionError, shown

PageNumbers: TypeAlias = "str | int | Sequence[int] | None"
_PART = re.compile(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{1,9})?)?\s*", re.ASCII)
_MOST_PARTS = 10_000


def check_page_numbers(wanted: PageNumbers) -> None:
    """Raise `OptionError` for what can be no pages of any document."""
    if wanted is not None:
        for first, last in _spans(wanted):
            if first < 1 or (last is not None and last < first):
                raise _senseless(wanted)


def chosen_pages(wanted: PageNumbers, count: int, name: str) -> Sequence[int]:
    """Numbers from 1, each once, in the order in which they are named; all of `count` pages where none is."""
    if wanted is None:
        return range(1, count + 1)
    numbers: dict[int, None] = {}
    for first, last in _spans(wanted):
        if max(first, last or 0) > count:
            raise OptionError(f"{name} has no page {max(first, last or 0)}, it ends with page {count:,}")
        numbers |= dict.fromkeys(range(first, (count if last is None else last) + 1))
    return list(numbers)


def _spans(wanted: str | int | Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """The first and the last number of each part; None: to the end."""
    parts = wanted.split(",") if isinstance(wanted, str) else [wanted] if isinstance(wanted, int) else wanted
    if not isinstance(parts, Sequence) or isinstance(parts, bytes | bytearray) or not 0 < len(parts) <= _MOST_PARTS:
        raise _senseless(wanted)
    for part in parts:
        if isinstance(part, int) and not isinstance(part, bool):
            yield part, part
        elif isinstance(part, str) and isinstance(wanted, str) and (said := _PART.fullmatch(part)):
            yield int(said[1]), int(said[3]) if said[3] else None if said[2] else int(said[1])
        else:
            raise _senseless(wanted)


def _senseless(wanted: object) -> OptionError:
    return OptionError(f"pages are numbers from 1, such as 1-3,7 or 5-, not {shown(wanted)}")
