"""Which files of a folder a batch asks about: its pictures, told by their names or else by what is in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from mcv_runtime.errors import ImageError, OptionError, shown
from mcv_runtime.pictures.formats import FORMATS, begins_as_picture
from mcv_runtime.pictures.images import open_local, picture_size

_NAMED = 5
"""Files that are left out and mentioned one by one."""


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """The pictures of a folder by name, and what of it is left out."""

    pictures: Sequence[str]
    hidden: int = 0
    """Names that begin with a dot: systems and programs keep their own files under such."""
    folders: int = 0
    others: Sequence[str] = ()

    @property
    def left_out(self) -> str:
        """In words; empty if nothing is."""
        counted = ((self.hidden, "hidden"), (self.folders, "folders" if self.folders > 1 else "folder"))
        parts = [f"{count:,} {what}" for count, what in counted if count]
        parts += [shown(name) for name in self.others[:_NAMED]]
        parts += [f"{len(self.others) - _NAMED:,} more"] if len(self.others) > _NAMED else []
        return ", ".join(parts)


def picture_folder(folder: Path) -> PictureFolder:
    """Sort out a folder, but not its subfolders; raises `OptionError` if it cannot be read or holds no picture."""
    hidden = folders = 0
    pictures: list[str] = []
    others: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    hidden += 1
                elif entry.is_dir():
                    folders += 1
                else:
                    (pictures if entry.is_file() and _is_picture(Path(entry.path)) else others).append(entry.name)
    except OSError as error:
        raise OptionError(f"{folder} cannot be read: {error.strerror}") from None
    found = PictureFolder(sorted(pictures), hidden, folders, sorted(others))
    if not pictures:
        why = f" (left out: {found.left_out})" if found.left_out else ""
        raise OptionError(f"there are no pictures in {folder}{why}; put some there, or name a file of requests")
    return found


def _is_picture(path: Path) -> bool:
    if path.suffix.lower() in _suffixes():
        return True
    try:
        with open_local(path) as file:
            begins = file.read(32)
        return begins_as_picture(begins) and picture_size(path) is not None
    except ImageError:
        return False


@cache
def _suffixes() -> frozenset[str]:
    """Of the formats that are read; whatever has one is asked about, and is an error if it turns out to be no picture."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
