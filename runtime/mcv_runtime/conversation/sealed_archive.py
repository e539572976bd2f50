"""Tensors in a file that is whole or not there.

A line with the format, a line with the sha256 of all that follows, and a NumPy archive.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.errors import ChatFileError, OutputError, ResourceError, printable
from mcv_runtime.files import open_regular
from mcv_runtime.writing import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

Add = Callable[[str, "NDArray[Any]"], None]
"""Puts a tensor into an archive, under a name."""


def write_sealed(path: Path, magic: bytes, fill: Callable[[Add], None]) -> None:
    """Write what `fill` adds to `path`, all or nothing; one tensor after the other, as a copy of all may not fit."""
    try:
        with replacing(path) as file:
            file.write(magic + b"0" * 64 + b"\n")
            with zipfile.ZipFile(file, "w") as archive:

                def add(name: str, values: NDArray[Any]) -> None:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, values, allow_pickle=False)

                fill(add)
            digest = _digest(file, magic)
            file.seek(len(magic))
            file.write(digest)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def sealed(path: Path, magic: bytes, what: str, instead: str) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The tensors of a file that `write_sealed` wrote; raises `ChatFileError`, also for what goes wrong with them.

    `what` it is, and what to do `instead`, stand in the message.
    """
    try:
        with open_regular(path, error=ChatFileError) as file:
            if file.read(len(magic)) != magic:
                raise ChatFileError(f"{path} is not {what} that was saved by this version")
            wanted = file.read(65)
            if wanted != _digest(file, magic) + b"\n":
                raise ChatFileError(f"{path} is damaged: its checksum does not fit; {instead}")
            file.seek(len(magic) + 65)
            with np.load(file, allow_pickle=False) as archive:
                yield archive
    except (ChatFileError, ResourceError):
        raise
    except OSError as error:
        raise ChatFileError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # zipfile, zlib and numpy raise whatever a damaged archive makes them raise
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise ChatFileError(f"{path} is damaged ({reason}); {instead}") from None


def _digest(file: Any, magic: bytes) -> bytes:
    """Of all behind the digest's own place."""
    file.seek(len(magic) + 65)
    return hashlib.file_digest(file, "sha256").hexdigest().encode()
