"""The rows of a batch: requests from a file with one JSON object a line, or one for each picture of a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.options import Options
from mcv_runtime.request.preparation import PictureSource
from mcv_runtime.request.request import Request

PICTURES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"})
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


def count_rows(source: Path) -> int:
    """How many there are at most; 0 where counting them would use them up."""
    if source.is_dir():
        return len(_pictures(source))
    if not source.is_file():
        return 0
    with source.open("rb") as file:
        return sum(1 for line in file if line.strip())


def batch_rows(source: Path, defaults: Defaults) -> Iterator[BatchRow]:
    """The rows of a file or folder, in order and one at a time; raises `OptionError` if it cannot be read."""
    return _folder(source, defaults) if source.is_dir() else _file(source, defaults)


def _folder(folder: Path, defaults: Defaults) -> Iterator[BatchRow]:
    if not defaults.prompt.strip():
        raise OptionError(f"{folder} is a folder of pictures; say what to ask about each with --prompt")
    names = _pictures(folder)
    if not names:
        raise OptionError(f"there are no pictures in {folder}; known are {', '.join(sorted(PICTURES))}")
    for number, name in enumerate(names, 1):
        yield _row(number, {"image": name}, folder, defaults)


def _pictures(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if Path(entry.name).suffix.lower() in PICTURES and entry.is_file())


def _file(path: Path, defaults: Defaults) -> Iterator[BatchRow]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line.decode("utf-8-sig"))
                    if not isinstance(fields, dict):
                        raise OptionError("the row is not a JSON object")
                    row = _row(number, fields, path.parent, defaults)
                except OptionError as error:
                    row = BatchRow(number=number, digest="", error=str(error), said=_said(fields))
                except (ValueError, RecursionError) as error:
                    row = BatchRow(number=number, digest="", error=f"the row is not JSON: {error}")
                yield row
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from None


def _row(number: int, fields: Mapping[str, Any], folder: Path, defaults: Defaults) -> BatchRow:
    for name in fields.keys() - _OWN - _OPTIONS:
        raise OptionError(f"a row has no field {name!r}; options have the names of Options")
    prompt, system = fields.get("prompt", defaults.prompt), fields.get("system", defaults.system)
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        raise OptionError("prompt and system are texts")
    images = _paths(fields, "image")
    if "images" in fields:
        images += _paths(fields, "images")
    videos = (Video(folder / path) for path in _paths(fields, "video"))
    seen: list[PictureSource] = [*(folder / path for path in images), *videos]
    chosen = {name: value for name, value in fields.items() if name in _OPTIONS and value is not None}
    options = Options.of(defaults.options, chosen)
    asked = [fields, prompt, system, options.given(), defaults.model]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    request = Request(seen, prompt, system, options)
    return BatchRow(number=number, digest=digest, request=request, said=_said(fields))


def _paths(fields: Mapping[str, Any], name: str) -> list[str]:
    given = fields.get(name, [])
    paths = [given] if isinstance(given, str) else given
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise OptionError(f"{name} is the path of a file, or a list of such")
    return paths


def _said(fields: Any) -> dict[str, Any]:
    names = ("id", "image", "images", "video")
    return {name: fields[name] for name in names if name in fields} if isinstance(fields, dict) else {}
