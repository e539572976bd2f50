"""Whether a value is of the type that a `TypedDict` says: what comes from a file or a form may be anything."""

from __future__ import annotations

import collections.abc
import threading
from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mcv_runtime.errors import OptionError

_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    threading.Event: "a threading.Event",
    collections.abc.Mapping: "a mapping",
    collections.abc.Callable: "something to call",
}


def check_types(options: Mapping[str, Any], declared: type) -> None:
    """Raise `OptionError` for names that `declared` does not have, and for values of another type."""
    hints = get_type_hints(declared)
    for name, value in options.items():
        if name not in hints:
            raise OptionError(f"there is no option {name!r}")
        if not _fits(value, hints[name]):
            raise OptionError(f"{name} must be {_named(hints[name])}, not {_shortened(value)}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if origin is collections.abc.Sequence:  # any order will do
        several = isinstance(value, collections.abc.Collection) and not isinstance(value, str | bytes | Mapping)
        return several and all(_fits(one, get_args(hint)[0]) for one in value)
    if origin in (int, float):  # a bool is an int, but True is no number
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin)


def _named(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return " or ".join(_named(one) for one in get_args(hint) if one is not NoneType)
    if origin is collections.abc.Sequence:
        return f"a list of {_named(get_args(hint)[0]).removeprefix('a ')}s"
    return " or ".join(map(repr, get_args(hint))) if origin is Literal else _NAMES[origin]


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
