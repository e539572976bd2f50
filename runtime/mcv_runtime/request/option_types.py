"""Whether an option exists, and a value is of its type: what comes from a file or a form may be anything."""

from __future__ import annotations

import collections.abc
import difflib
import os
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mcv_runtime.errors import OptionError, shown

_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    os.PathLike: "a path",
    threading.Event: "a threading.Event",
    collections.abc.Mapping: "a mapping",
    collections.abc.Callable: "something to call",
}
_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "n": "num_return_sequences",
    "best_of": "num_beams",
    "beam_size": "num_beams",
    "temp": "temperature",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "enable_thinking": "thinking",
    "guided_json": "json_schema",
    "response_format": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choices",
    "max_slices": "max_slice_nums",
    "max_frames": "max_num_frames",
}
"""Names that other programs have for our options."""


def check_types(options: Any) -> None:
    """Raise `OptionError` for fields of a dataclass whose values are of another type than declared."""
    kind: type = type(options)
    for name, hint in _hints(kind).items():
        value = getattr(options, name)
        if value is not None or name not in _nullable(kind):  # most are left out, of each of a million rows
            check_type(name, value, hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise `OptionError` for a value of another type than declared."""
    if not _fits(value, hint):
        raise OptionError(f"{name} must be {_named(hint)}, not {_shortened(value)}")


def check_names(given: Iterable[str], kind: type) -> None:
    """Raise `OptionError` for names that are none of a dataclass's fields, with the one that was probably meant."""
    known = _hints(kind)
    for name in given:
        if name not in known:
            meant = _ELSEWHERE.get(name, name)
            near = [meant] if meant in known else difflib.get_close_matches(str(meant), known, 1)
            raise OptionError(f"there is no option {shown(name)} here" + (f"; did you mean {near[0]}?" if near else ""))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _nullable(kind: type) -> frozenset[str]:
    return frozenset(name for name, hint in _hints(kind).items() if _fits(None, hint))


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
