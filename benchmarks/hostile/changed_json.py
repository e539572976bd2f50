"""JSON with one thing in it that nobody would write."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Path = tuple[Any, ...]
GONE = object()


class Raw(str):
    """Text that is written as it is, not as a JSON string."""


ODD: list[Any] = [GONE, None, True, False, "", "\0", "\ud800", "a" * 100_000, "a" * 300, "../../../etc/passwd", "/etc/passwd"]
ODD += ["\x1b[31mred\n", "{{ 1 }}", "<unk>", "object", "x", -1, 0, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 10**30]
ODD += [-(2**63), 0.5, 1e308, -1e308, 1e-320, [], {}, [[]], {"": {}}, [None], [1], ["a"] * 10_000, [0] * 100_000, {"a": 1}]
ODD += [Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1" + "0" * 5000), Raw('{"a": 1, "a": 2}'), Raw("")]
ODD += [Raw("[" * depth + "]" * depth) for depth in (500, 100_000)]


def places(value: Any, at: Path = (), *, most: int = 3) -> Iterator[Path]:
    """The place of each value, and of the first `most` of a list."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key), most=most)
    elif isinstance(value, list):
        for index in range(min(len(value), most)):
            yield from places(value[index], (*at, index), most=most)


def changed(value: Any, dice: Random, wanted: Callable[[Path], bool] = lambda path: True) -> tuple[str, bytes]:
    """What was changed, and the JSON text with the change."""
    at = dice.choice([path for path in places(value) if wanted(path)])
    odd = dice.choice(ODD)
    made = copy.deepcopy(value)
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    mark = "@@raw@@"
    if odd is GONE:
        del inner[at[-1]]
    else:
        inner[at[-1]] = mark if isinstance(odd, Raw) else odd
    text = json.dumps(made)
    if isinstance(odd, Raw):
        text = text.replace(json.dumps(mark), odd)
    said = "gone" if odd is GONE else repr(odd)[:40]
    return f"{'.'.join(map(str, at))[:80]} is {said}", text.encode("utf-8", "surrogatepass")
