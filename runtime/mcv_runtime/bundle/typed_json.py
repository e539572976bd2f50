"""JSON as instances of annotated types: an object becomes a dataclass, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mcv_runtime.errors import BundleCorruptError, shown

_LONGEST_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Between:
    """The numbers from `least` to `most`: what no published model comes near, and no machine dies of."""

    least: float
    most: float

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"from {self.least:,} to {self.most:,}"


class OneOf(frozenset[str]):
    """The texts that a value may be."""

    def __str__(self) -> str:
        return f"one of {', '.join(sorted(self))}"


def parse(kind: Any, value: Any, where: str) -> Any:
    """`value` (as `json.loads` gives it) as an instance of the annotated type `kind`; `where` it stands, for the message.

    What an `Annotated` type says besides must contain the value.
    """
    if dataclasses.is_dataclass(kind):
        return _parse_object(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        value = parse(args[0], value, where)
        if value not in args[1]:
            raise BundleCorruptError(f"{where} is {shown(value)}, not {args[1]}")
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise BundleCorruptError(f"{where} is {shown(value)}; this runtime knows {', '.join(map(repr, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        for option in args:
            plain = get_args(option)[0] if get_origin(option) is Annotated else option
            if option is type(None) and value is None:
                return None
            if type(value) is plain or (dataclasses.is_dataclass(plain) and isinstance(value, dict)):
                return parse(option, value, where)
        raise BundleCorruptError(f"{where} has the unusable value {shown(value)}")
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleCorruptError(f"{where} must be a list")
        return tuple(parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise BundleCorruptError(f"{where} must be an object")
        return {parse(args[0], key, where): parse(args[1], item, f"{where}: {shown(key)}") for key, item in value.items()}
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise BundleCorruptError(f"{where} must be {kind.__name__}, not {shown(value)}")
    if kind is str and len(value) > _LONGEST_TEXT:
        raise BundleCorruptError(f"{where} has {len(value):,} characters; at most {_LONGEST_TEXT:,} are read")
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _parse_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleCorruptError(f"{where} must be an object")
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value.keys() - fields.keys():
        raise BundleCorruptError(f"{where} has the unknown key {shown(name)}; is the bundle newer than this runtime?")
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise BundleCorruptError(f"{where} lacks the key {shown(name)}")
    return kind(**{name: parse(hints[name], item, f"{where}: {name}") for name, item in value.items()})
