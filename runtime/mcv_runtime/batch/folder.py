"""The pictures and documents of a folder and of the folders in it, told by their names or else by what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image

from mcv_runtime.batch.remote import Place, RemoteFile
from mcv_runtime.batch.rows import BatchRow, Defaults, rows_of
from mcv_runtime.documents.pdf import begins_as_pdf
from mcv_runtime.errors import ImageError, OptionError, shown
from mcv_runtime.pictures.formats import FORMATS, begins_as_picture, heic_reader
from mcv_runtime.pictures.images import open_local, picture_size

Kind = Literal["file", "folder", "link"]
"""Of an entry of a folder; a link leads to a folder."""
_NAMED = 5
"""Files that are left out and mentioned one by one."""
_DEEPEST = 64


class FolderSource:
    """A folder, gone through in the order of the names; what is left out is known when all rows are given.

    Of a store, files are told by their names alone.
    """

    def __init__(self, folder: Place, defaults: Defaults) -> None:
        self._folder, self._defaults = folder, defaults
        self._hidden = self._links = self._others = 0
        self._named: list[str] = []

    def count(self) -> int:
        """How many files there are at most."""
        return sum(1 for _ in self._files())

    def rows(self) -> Iterator[BatchRow]:
        """One for each picture or document; raises `OptionError` if there is none, or nothing to ask about it."""
        if not self._defaults.prompt.strip():
            raise OptionError(f"{self._folder} is a folder of pictures; say what to ask about each with --prompt")
        self._hidden = self._links = self._others = number = 0
        self._named = []
        located = self._folder.joined if isinstance(self._folder, RemoteFile) else self._folder.joinpath
        for name in self._files():
            if _is_wanted(located(name)):
                number += 1
                yield from rows_of(number, {"image": name}, located, self._defaults)
            else:
                self._leave(name)
        if not number:
            why = f" (left out: {self.left_out})" if self.left_out else ""
            raise OptionError(f"there are no pictures in {self._folder}{why}; put some there, or name a file of requests")

    @property
    def left_out(self) -> str:
        """In words; empty if nothing is."""
        counted = ((self._hidden, "hidden"), (self._links, "links to folders"))
        parts = [f"{count:,} {what}" for count, what in counted if count]
        parts += map(shown, self._named)
        parts += [f"{self._others - _NAMED:,} more"] if self._others > _NAMED else []
        return ", ".join(parts)

    def _files(self, inner: str = "", depth: int = 0) -> Iterator[str]:
        """By their paths from the folder, those of one folder at a time in memory."""
        for last, kind in _entries(self._folder, inner):
            name = f"{inner}/{last}" if inner else last
            if last.startswith("."):  # systems and programs keep their own files under such names
                self._hidden += 1
            elif kind == "folder":
                if depth == _DEEPEST:
                    raise OptionError(f"{shown(f'{self._folder}/{inner}')} is {_DEEPEST} folders deep; name one that is nearer")
                yield from self._files(name, depth + 1)
            elif kind == "link":  # it may lead round in a circle, or to what is elsewhere
                self._links += 1
            else:
                yield name

    def _leave(self, name: str) -> None:
        self._others += 1
        if len(self._named) < _NAMED:
            self._named.append(name)


def is_named_as_picture(name: str) -> bool:
    """Whether a file's name ends as that of a picture or document; it is an error if it turns out to be none."""
    return Path(name).suffix.lower() in _suffixes()


def _entries(top: Place, inner: str) -> list[tuple[str, Kind]]:
    """The names in a folder in their order, and what each is."""
    if isinstance(top, RemoteFile):
        folder = top.joined(inner) if inner else top
        return [(name, "folder" if is_folder else "file") for name, is_folder in folder.entries()]
    try:
        with os.scandir(top / inner) as entries:
            return sorted((entry.name, _kind(entry)) for entry in entries)
    except OSError as error:
        raise OptionError(f"{top / inner} cannot be read: {error.strerror}") from None


def _kind(entry: os.DirEntry[str]) -> Kind:
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "link" if entry.is_dir() else "file"


def _is_wanted(path: Place) -> bool:
    if isinstance(path, RemoteFile):  # to look into each would be to read most of it
        return is_named_as_picture(path.name)
    if not path.is_file():
        return False
    if is_named_as_picture(path.name):
        return True
    try:
        with open_local(path) as file:
            begins = file.read(64)
        return begins_as_pdf(begins) or (begins_as_picture(begins[:32]) and picture_size(path) is not None)
    except ImageError:
        return False


@cache
def _suffixes() -> frozenset[str]:
    heic = {".heic", ".heif"} if heic_reader() is not None else set()
    return frozenset({".pdf", *heic, *(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)})
