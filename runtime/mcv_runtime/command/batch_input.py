"""The rows of a batch: requests from a file with one JSON object a line, or one for each picture of a folder.

What is null in a row is as if it were left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mcv_runtime.command.batch_folder import PictureFolder
from mcv_runtime.errors import OptionError, shown
from mcv_runtime.files import at_home, parse_json
from mcv_runtime.pictures.images import is_address
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.options import Options
from mcv_runtime.request.preparation import PictureSource
from mcv_runtime.request.request import Request

ROW_BYTES = 16 << 20
"""The longest row that is read."""
_PATH_CHARACTERS = 4096
"""The longest path that a system takes."""
_OWN = frozenset({"id", "image", "images", "video", "prompt", "system"})
_OPTIONS = {field.name for field in dataclasses.fields(Options)} - {"cancel", "progress"}
"""What a file can name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a row does not say itself."""

    prompt: str
    system: str | None
    options: Options
    model: str
    """Identity of the bundle: other models give other answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One row, and how it is found again among answers: by a digest of all that its answer depends on but the pixels."""

    number: int
    """Line of the file, or place among the pictures; from 1."""
    digest: str
    said: Mapping[str, Any] = field(default_factory=dict)
    """What of the row is repeated beside its answer: id and pictures."""
    request: Request | None = None
    error: str = ""
    """Why there is no request."""


def count_rows(source: Path, pictures: PictureFolder | None = None) -> int:
    """How many there are at most; 0 where counting them would use them up."""
    if pictures is not None:
        return len(pictures.pictures)
    if not source.is_file():
        return 0
    with source.open("rb") as file:
        return sum(1 for line in _lines(file) if line.strip())


def batch_rows(source: Path, defaults: Defaults, pictures: PictureFolder | None = None) -> Iterator[BatchRow]:
    """The rows of a file, or those about the `pictures` of a folder, in order and one at a time.

    Raises `OptionError` if the file cannot be read, or there is nothing to ask about the pictures.
    """
    return _file(source, defaults) if pictures is None else _folder(source, pictures, defaults)


def _folder(folder: Path, pictures: PictureFolder, defaults: Defaults) -> Iterator[BatchRow]:
    if not defaults.prompt.strip():
        raise OptionError(f"{folder} is a folder of pictures; say what to ask about each with --prompt")
    for number, name in enumerate(pictures.pictures, 1):
        yield _row(number, {"image": name}, folder.joinpath, defaults)


def _file(path: Path, defaults: Defaults) -> Iterator[BatchRow]:
    folder = path.parent

    def located(text: str) -> Path:
        if is_address(text) or len(text) > _PATH_CHARACTERS:
            raise OptionError(f"{_cut(text)} is no path of a file; save what it stands for, and name that file")
        found = folder / at_home(text)
        _require_plain(found)
        return found

    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISCHR(mode) and not file.isatty():
                raise OptionError(f"{path} is a device; --batch takes a file of requests or a folder of pictures")
            if not _is_plain(path, mode):  # from `|` or `<(...)`: nothing lies beside it
                folder = Path()
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    yield _parsed(number, line, located, defaults)
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from None


def _require_plain(path: Path) -> None:
    """Raise `OptionError` for a pipe, a device, or what a system tells of its processes: a row may be a stranger's.

    What `mcv-run` itself is given on its command line, a pipe for example, is its user's own.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):  # not there, or no name: said when it is opened
        return
    if not _is_plain(path, status.st_mode):
        raise OptionError(f"{shown(str(path))} is not a plain file; a row names pictures and videos that are saved as files")


def _is_plain(path: Path, mode: int) -> bool:
    spelled = os.path.normpath(path), os.path.realpath(path)
    return stat.S_ISREG(mode) and not any(re.match(r"/proc/|/dev/(fd/|[^/]+$)", name) for name in spelled)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than a row may be, the beginning."""
    while line := file.readline(ROW_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(ROW_BYTES + 1)


def _parsed(number: int, line: bytes, located: Callable[[str], Path], defaults: Defaults) -> BatchRow:
    def unreadable(reason: str) -> OptionError:
        return OptionError(f"the row cannot be read, it is not JSON as a row has it: {reason}")

    fields = None
    try:
        fields = parse_json(line, "it", error=unreadable, max_bytes=ROW_BYTES)
        if not isinstance(fields, dict):
            raise OptionError("the row is not a JSON object")
        return _row(number, fields, located, defaults)
    except OptionError as error:
        return BatchRow(number=number, digest="", error=str(error), said=_said(fields))


def _row(number: int, fields: Mapping[str, Any], located: Callable[[str], Path], defaults: Defaults) -> BatchRow:
    for name in sorted(fields.keys() - _OWN - _OPTIONS):
        raise OptionError(f"a row has no field {shown(name)}; options have the names of Options")
    fields = {name: value for name, value in fields.items() if value is not None}
    prompt, system = fields.get("prompt", defaults.prompt), fields.get("system", defaults.system)
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        raise OptionError("prompt and system are texts")
    images = [located(path) for name in ("image", "images") for path in _paths(fields, name)]
    videos = [Video(located(path)) for path in _paths(fields, "video")]
    seen: list[PictureSource] = [*images, *videos]
    options = Options.of(defaults.options, {name: value for name, value in fields.items() if name in _OPTIONS})
    asked = [fields, prompt, system, options.given(), defaults.model]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    request = Request(seen, prompt, system, options)
    return BatchRow(number=number, digest=digest, request=request, said=_said(fields))


def _paths(fields: Mapping[str, Any], name: str) -> list[str]:
    given = fields.get(name, [])
    paths = [path for path in given if path is not None] if isinstance(given, list) else [given]
    if not all(isinstance(path, str) and path for path in paths):
        raise OptionError(f"{name} is the path of a file, or a list of such")
    return paths


def _said(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict):
        return {}
    said = {name: fields[name] for name in ("id", "image", "images", "video") if fields.get(name) is not None}
    return {name: value if name == "id" else _cut(value) for name, value in said.items()}


def _cut(value: Any) -> Any:
    """A path, or several; of what is long and no path, the beginning."""
    if isinstance(value, list):
        return [_cut(one) for one in value]
    is_long = isinstance(value, str) and (len(value) > _PATH_CHARACTERS or (len(value) > 80 and is_address(value)))
    return f"{value[:80]}..." if is_long else value
