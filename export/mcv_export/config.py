"""Reading values from a checkpoint's JSON files, with errors that name the key, and with a memory of what was read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mcv_runtime.errors import CheckpointError, shown

_MOST = 1 << 31
"""Above any number of anything in a configuration, and below what torch takes for a size."""


class Config(Mapping[str, Any]):
    """A JSON object of somebody's file that remembers which of its keys were read.

    null counts as not there, as transformers writes it for a value that has its default; `nulls` are those keys.
    """

    def __init__(self, data: Mapping[str, Any], file: str = "config.json", path: str = "") -> None:
        self.file = file
        self.path = path
        """Where this object stands in the file: `""`, or `text_config.` and the like."""
        self.nulls = frozenset(key for key, value in data.items() if value is None)
        self._values = {
            key: Config(value, file, f"{path}{key}.") if isinstance(value, dict) else value
            for key, value in data.items()
            if value is not None
        }
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self._read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:  # reads nothing
        return self._values == (other._values if isinstance(other, Config) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._values)

    def pass_over(self) -> None:
        """Count all that is in here as read: nothing uses it."""
        self._read.update(self._values)
        for value in self._values.values():
            if isinstance(value, Config):
                value.pass_over()

    def unread(self) -> Iterator[tuple[str, str, Any]]:
        """The keys that nobody read, but for empty objects: each alone, with the objects it stands in, and its value."""
        for key, value in self._values.items():
            if isinstance(value, Config) and not value:
                continue
            if key not in self._read:
                yield key, self.path + key, value
            elif isinstance(value, Config):
                yield from value.unread()


class Overlay(Mapping[str, Any]):
    """Several objects as one: the first that has a key says its value, and all count as read."""

    def __init__(self, *layers: Mapping[str, Any]) -> None:
        self._layers = layers

    def __getitem__(self, key: str) -> Any:
        values = [layer[key] for layer in self._layers if key in layer]
        if not values:
            raise KeyError(key)
        return values[0]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for layer in self._layers for key in layer))

    def __len__(self) -> int:
        return len(list(iter(self)))


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object."""
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json has no section {shown(key)}")
    return value


def optional_section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object, empty where there is none."""
    return section(config, key) if key in config else {}


def integer(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """An integer, positive unless `least` says otherwise."""
    value = config.get(key, default)
    if type(value) is not int or not least <= value < _MOST:
        kind = "a positive integer" if least == 1 else f"an integer from {least} on"
        raise CheckpointError(_complaint(config, key, value, f"{kind} below {_MOST:,}"))
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number."""
    value = config.get(key, default)
    if not _is_number(value) or value <= 0:
        raise CheckpointError(_complaint(config, key, value, "a positive number"))
    return float(value)


def numbers(config: Mapping[str, Any], key: str, default: tuple[float, ...] | None = None) -> tuple[float, ...]:
    """A list of numbers."""
    value = config.get(key, default)
    if not isinstance(value, list | tuple) or not all(map(_is_number, value)):
        raise CheckpointError(_complaint(config, key, value, "a list of numbers"))
    return tuple(map(float, value))


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(_complaint(config, key, value, "true or false"))
    return value


def string(config: Mapping[str, Any], key: str, default: str) -> str:
    value = config.get(key, default)
    if not isinstance(value, str):
        raise CheckpointError(_complaint(config, key, value, "a string"))
    return value


def expect(config: Mapping[str, Any], key: str, wanted: object, *same: object) -> None:
    """Raise `CheckpointError` where a key has another than the one supported value; `same` are other spellings of it."""
    value = config.get(key, wanted)
    if (list(value) if isinstance(value, tuple) else value) not in (wanted, *same):
        raise CheckpointError(f"config has {named(config, key)}={shown(value)}; of this family mcv knows {wanted!r} only")


def affine(names: Mapping[str, str]) -> dict[str, str]:
    """`.weight` and `.bias` of each module, ours -> the checkpoint's."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}


def named(config: Mapping[str, Any], key: str) -> str:
    """A key with the objects that it stands in, for messages."""
    return f"{config.path}{key}" if isinstance(config, Config) else key


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # not NaN either


def _complaint(config: Mapping[str, Any], key: str, value: object, wanted: str) -> str:
    if value is None:
        null = isinstance(config, Config) and key in config.nulls
        return f"config has {named(config, key)}=null, which has no default" if null else f"config lacks the key {shown(key)}"
    return f"config has {named(config, key)}={shown(value)}, which is not {wanted}"
