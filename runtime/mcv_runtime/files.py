"""A stranger's file: opened only where it is a plain file of bounded size, and its JSON parsed within bounds.

A stranger's are all files but ours: pictures, videos, checkpoints, bundles, cache entries, conversations, rows of a batch.
`error` is what the caller wants raised: an `McvError` class, or a function that makes one of the message.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from mcv_runtime.errors import printable, shown

MakeError: TypeAlias = Callable[[str], Exception]

TEXT_BYTES = 64 << 20
"""The largest text: published tokenizers have up to 35 MB."""
JSON_DEPTH = 64
"""Levels of the deepest JSON; published files have 10."""

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")


def open_regular(
    path: str | os.PathLike[str],
    *,
    error: MakeError,
    missing: MakeError | None = None,
    within: str | os.PathLike[str] | None = None,
    max_bytes: int | None = None,
) -> BufferedReader:
    """Open a plain file for reading, without ever waiting: not a pipe, a device or a folder, and of at most `max_bytes`.

    `within`: the folder that the file must lie in when all links are followed (the hub's cache keeps files as links to the
    `blobs` beside its `snapshots`; these count as inside). Without it a link is followed wherever it leads, which is right for
    a path that the user gave himself. `missing` is raised in the place of `error` where there is no such file.
    """
    name = _spelled(path)
    # O_NONBLOCK: what has become a pipe since it was looked at is opened too, and refused below
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    file, outside = None, False
    try:
        real = Path(os.path.realpath(path, strict=True))
        outside = within is not None and not any(real.is_relative_to(root) for root in _roots(within))
        mode = real.stat().st_mode
        if stat.S_ISREG(mode) and not outside:  # a device may feel that it is opened
            file = os.fdopen(os.open(real, flags), "rb")
    except (FileNotFoundError, NotADirectoryError):
        link = os.path.islink(path)  # noqa: PTH114 - Path's own raises for a name that is too long
        raise (missing or error)(f"{name} is {'a link to what is not there' if link else 'not there'}") from None
    except OSError as cause:
        raise error(f"{name} cannot be read: {cause.strerror}") from None
    except ValueError:  # a NUL, or half a character, in the name
        raise error(f"{name} is no name of a file") from None
    if outside:
        raise error(f"{name} leads out of {_spelled(within or '')}; put the file itself there")
    if file is None:
        raise error(f"{name} is {_kind(mode)}, not a file")
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{name} is {_kind(status.st_mode)}, not a file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise error(f"{name} has {status.st_size:,} bytes; at most {max_bytes:,} are read")
    except BaseException:
        file.close()
        raise
    return file


def read_regular(
    path: str | os.PathLike[str],
    *,
    error: MakeError,
    missing: MakeError | None = None,
    within: str | os.PathLike[str] | None = None,
    max_bytes: int = TEXT_BYTES,
) -> bytes:
    """All of a plain file, which is opened as `open_regular` does."""
    with open_regular(path, error=error, missing=missing, within=within, max_bytes=max_bytes) as file:
        return read_bounded(file, _spelled(path), error=error, max_bytes=max_bytes)


def read_text(
    path: str | os.PathLike[str],
    *,
    error: MakeError,
    missing: MakeError | None = None,
    within: str | os.PathLike[str] | None = None,
    max_bytes: int = TEXT_BYTES,
) -> str:
    """All of a plain UTF-8 file, line ends as they are."""
    try:
        return read_regular(path, error=error, missing=missing, within=within, max_bytes=max_bytes).decode()
    except UnicodeDecodeError:
        raise error(f"{_spelled(path)} is not UTF-8 text") from None


def read_bounded(file: BinaryIO, what: str, *, error: MakeError, max_bytes: int) -> bytes:
    """The rest of a file or stream (which may be a pipe that the user gave); `error` where that is more than `max_bytes`."""
    try:
        data = file.read(max_bytes + 1)
    except OSError as cause:
        raise error(f"{what} cannot be read: {cause.strerror}") from None
    if len(data) > max_bytes:
        raise error(f"{what} has more than {max_bytes:,} bytes")
    return data


def at_home(path: str | os.PathLike[str]) -> Path:
    """The path with a leading ~ as the home folder that it stands for; as it is, if there is nobody of that name."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):  # nobody of that name, or no name at all
        return Path(path)


def parse_json(
    text: str | bytes, what: str, *, error: MakeError, max_bytes: int = TEXT_BYTES, max_depth: int = JSON_DEPTH
) -> Any:
    """The value that a JSON text holds; `what` names the text in a message.

    Refused are a text that is too long or nested too deeply, a key that stands twice in an object (readers differ in which
    of the two they take), numbers that are not finite, and halves of characters, which nobody could write down again.
    """
    strange: list[float] = []

    def number(written: str) -> float:
        value = float(written)
        if not math.isfinite(value):
            strange.append(value)
        return value

    if len(text) > max_bytes:
        raise error(f"{what} has more than {max_bytes:,} bytes")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unrepeated, parse_float=number, parse_constant=number)
        _require_shallow(value, max_depth)
        if strange:
            raise ValueError(f"{next(_not_finite(value))} is no number")
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise error(f"{what} is not UTF-8 text") from None
    except UnicodeEncodeError:
        raise error(f"{what} has half a character (a lone surrogate) in a string") from None
    except RecursionError:
        raise error(f"{what} is nested more than {max_depth} levels deep") from None
    except ValueError as cause:
        raise error(f"{what} is not JSON ({cause})") from None
    return value


def _roots(folder: str | os.PathLike[str]) -> list[str]:
    root = os.path.realpath(folder)
    if (snapshots := Path(root).parent).name == "snapshots" and snapshots.parent.name.startswith(("models--", "datasets--")):
        return [root, str(snapshots.parent / "blobs")]
    return [root]


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def _spelled(path: str | os.PathLike[str]) -> str:
    """A path as it may stand in a message."""
    text = os.fspath(path)
    return text if text.isprintable() and len(text) < 500 else shown(text)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} stands twice")
    return found


def _not_finite(value: Any, place: str = "") -> Iterator[str]:
    """Where in a value are numbers that are not finite, as `key.key[index]=NaN`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{printable(place)[:200]}={json.dumps(value)}".removeprefix("=")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{index}]")


def _require_shallow(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        level = [item for container in level for item in (container.values() if isinstance(container, dict) else container)]
    raise RecursionError
