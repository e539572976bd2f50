"""The rows of a tar archive as WebDataset has it: files of one name make a sample, `0001.jpg` with `0001.json`.

The pictures and documents of a sample are what is asked about, and its `.json` says a row's fields. Its name is the row's id.
"""

from __future__ import annotations

import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from mcv_runtime.batch.folder import is_named_as_picture
from mcv_runtime.batch.remote import Place, open_place
from mcv_runtime.batch.rows import FIELDS, FILE_BYTES, ROW_BYTES, BatchRow, Defaults, Encoded, files_beside, refused, rows_of
from mcv_runtime.errors import OptionError, shown
from mcv_runtime.files import parse_json

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_NAMED = 5


class ArchiveSource:
    """A tar archive, read once from its beginning to its end."""

    def __init__(self, path: Place, defaults: Defaults) -> None:
        self._path, self._defaults = path, defaults
        self._others: dict[str, None] = {}

    @property
    def left_out(self) -> str:
        """Kinds of files, and fields of theirs, that are no part of a request."""
        return ", ".join(map(shown, self._others))

    def count(self) -> int:
        """Nobody knows before it is read."""
        return 0

    def rows(self) -> Iterator[BatchRow]:
        """In order, one sample in memory; raises `OptionError` for an archive that is damaged."""
        located = files_beside(self._path.parent, self._defaults.fetch)
        number = 0
        with open_place(self._path) as file:
            for name, sample in _samples(file, self._path):
                number += 1
                try:
                    fields = self._fields(name, sample)
                except OptionError as error:
                    yield refused(number, str(error), {"id": name})
                else:
                    yield from rows_of(number, fields, located, self._defaults)

    def _fields(self, name: str, sample: list[tuple[str, bytes | None]]) -> dict[str, Any]:
        fields: dict[str, Any] = {"id": name}
        images: list[Encoded] = []
        for suffix, data in sample:
            if data is None and (suffix == "json" or is_named_as_picture(f"{name}.{suffix}")):
                raise OptionError(f"{name}.{suffix} is no plain file, or larger than {FILE_BYTES:,} bytes")
            if suffix == "json" and data is not None:
                said = parse_json(data, f"{name}.json", error=OptionError, max_bytes=ROW_BYTES)
                if not isinstance(said, dict):
                    raise OptionError(f"{name}.json is not a JSON object")
                fields |= {key: value for key, value in said.items() if key in FIELDS - {"image", "images", "video"}}
                self._leave(*(f"{key} of .json" for key in said.keys() - FIELDS))
            elif not is_named_as_picture(f"{name}.{suffix}"):
                self._leave(f".{suffix}")
            elif data is not None:
                images.append(Encoded(data, f"{name}.{suffix}"))
        if not images:
            raise OptionError(f"the sample {shown(name)} has no picture; its files have one name, and follow one another")
        return {**fields, "image": images[0]} if len(images) == 1 else {**fields, "images": images}

    def _leave(self, *names: str) -> None:
        for name in names:
            if len(self._others) < _NAMED:
                self._others[name] = None


def _samples(file: Any, path: Place) -> Iterator[tuple[str, list[tuple[str, bytes | None]]]]:
    """The name of each sample and its files by suffix; None: no plain file, or too large a one."""
    name, sample = "", list[tuple[str, bytes | None]]()
    read = 0
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                folder, last = posixpath.split(member.name)
                stem, _, suffix = last.partition(".")
                if not stem:  # hidden: a system's own
                    continue
                of = posixpath.join(folder, stem)
                if of != name and sample:
                    yield name, sample
                    sample = []
                plain = archive.extractfile(member) if member.isreg() and member.size <= FILE_BYTES else None
                name = of
                sample.append((suffix.lower(), None if plain is None else plain.read()))
                read += 1
                archive.members = []  # type: ignore[attr-defined] # or all that it has read stays in memory
            end = archive.offset + tarfile.BLOCKSIZE  # of zeros
            if archive.fileobj is None or archive.fileobj.tell() < end:
                raise EOFError("it is cut off")
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise OptionError(f"{path} is damaged behind {read:,} files, or no tar archive: {error}") from None
    if sample:
        yield name, sample
