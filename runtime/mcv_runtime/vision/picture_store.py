"""Encoded pictures in a folder, which several processes may share."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mcv_runtime.errors import OutputError
from mcv_runtime.files import open_regular
from mcv_runtime.locks import try_lock
from mcv_runtime.writing import sync

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOG = logging.getLogger(__name__)
_ENTRY, _PARTIAL = re.compile(r"[0-9a-f]+\.mcvpicture"), re.compile(r"\.[0-9a-f]+\.[0-9a-f]{16}")
"""Names of what is made here: an entry, and one that is not whole yet. Nothing else in the folder is touched."""
_HEADER = struct.Struct("<8s32sQQ")
"""Magic, sha256 of name, shape and values, rows, columns; float32 values follow, all little-endian."""
_MAGIC = b"MCVPIC01"


class PictureStore:
    """At most `limit_bytes` of encoded pictures, the least recently used deleted first; threads and processes may share it.

    A cache fails no request: an entry that is damaged, of another user, no plain file, or that cannot be read is none, with a
    line in the log, and so is one that cannot be written. An entry is written under another name and then renamed, so that
    nobody reads half of one; what the power fails in is found by its digest. Only what was made here is ever deleted: plain
    files of this user with the names of entries, and such partial ones as no process holds any more, which count as well.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        """Raises `OutputError` for a folder that cannot be made, or into which anybody may write."""
        self._folder, self._limit = Path(folder), limit_bytes
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self._folder.stat().st_mode
        except OSError as error:
            raise OutputError(f"the cache folder {folder} cannot be made ({error.strerror}); choose another") from error
        if hasattr(os, "geteuid") and mode & stat.S_IWOTH:
            raise OutputError(f"anybody may write into the cache folder {folder}: `chmod o-w` it, or choose another")

    def get(self, key: str, shape: tuple[int, int] | None = None) -> NDArray[np.float32] | None:
        """The embeddings [visual tokens, hidden] of a picture, if they are here, whole, finite and of that shape."""
        path = self._path(key)
        try:
            with open_regular(path, error=_UnusableError, missing=_MissingError, within=self._folder) as file:
                status = os.fstat(file.fileno())
                if not _is_ours(status):
                    raise _UnusableError(f"{path} is another user's")
                embeds = self._read(file, status.st_size, key, shape)
        except _MissingError:
            return None
        except (_UnusableError, OSError) as error:
            _LOG.warning("cached picture %s; encoding it again", error)
            return None
        if embeds is None:
            _LOG.warning("cached picture %s is damaged; encoding it again", path)
            _remove(path)
            return None
        with suppress(OSError):  # gone meanwhile, or a folder that is only read
            os.utime(path)  # used now
        return embeds

    def put(self, key: str, embeds: NDArray[np.float32]) -> None:
        """Keep the embeddings of a picture, and delete what is too much."""
        values = np.ascontiguousarray(embeds, "<f4")
        if _HEADER.size + values.nbytes > self._limit or not np.isfinite(values).all():
            return
        try:
            self._write(key, values)
            self._shrink()
        except OSError as error:
            _LOG.warning("the picture cache %s cannot be written (%s)", self._folder, error.strerror)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.mcvpicture"

    def _read(self, file: BinaryIO, size: int, key: str, shape: tuple[int, int] | None) -> NDArray[np.float32] | None:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, digest, *said = _HEADER.unpack(header)
        count = math.prod(said)
        if magic != _MAGIC or not count or size != _HEADER.size + 4 * count:
            return None
        if size > self._limit if shape is None else tuple(said) != shape:  # before memory is taken for it
            return None
        values = np.empty(said, "<f4")
        if file.readinto(values.data.cast("B")) != values.nbytes:  # type: ignore[attr-defined]  # a buffered file has it
            return None
        if _digest(key, values) != digest or not np.isfinite(values).all():
            return None
        values.flags.writeable = False
        return values.astype(np.float32, copy=False)

    def _write(self, key: str, values: NDArray[np.float32]) -> None:
        partial = self._folder / f".{key}.{secrets.token_hex(8)}"
        with open(partial, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            try:
                # locked as long as somebody writes it; who looks for left ones may just have taken it for one
                if try_lock(file.fileno()) is False or not os.fstat(file.fileno()).st_nlink:
                    return
                file.write(_HEADER.pack(_MAGIC, _digest(key, values), *values.shape))
                file.write(values.data)
                sync(file)
                if _may_become(self._path(key)):
                    partial.replace(self._path(key))
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)

    def _shrink(self) -> None:
        """Delete what killed processes left, and the entries that were not used for longest until the rest fits."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            is_partial = path.name.startswith(".")
            if _sweep(path) if is_partial else total > self._limit and _remove(path):
                total -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(last use in ns, size, path) of all that was made here; partial ones come first in order."""
        with os.scandir(self._folder) as found:
            for file in found:
                is_partial = _PARTIAL.fullmatch(file.name)
                if not is_partial and not _ENTRY.fullmatch(file.name):
                    continue
                with suppress(FileNotFoundError):  # another process is faster
                    status = file.stat(follow_symlinks=False)
                    if _is_ours(status):
                        yield 0 if is_partial else status.st_mtime_ns, status.st_size, Path(file.path)


class _MissingError(Exception):
    """There is no such entry."""


class _UnusableError(Exception):
    """What has the name of an entry is none."""


def _is_ours(status: os.stat_result) -> bool:
    """Whether it is a plain file of this user, where there are users."""
    return stat.S_ISREG(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


def _may_become(path: Path) -> bool:
    """Whether nothing is there that was not made here."""
    try:
        return _is_ours(path.lstat())
    except FileNotFoundError:
        return True


def _sweep(partial: Path) -> bool:
    """Delete a partial entry that nobody writes any more."""
    try:
        with open_regular(partial, error=_UnusableError) as file:
            return try_lock(file.fileno()) is True and _remove(partial)
    except _UnusableError:
        return False


def _remove(path: Path) -> bool:
    """Delete what was made here, if that is so and can be done."""
    with suppress(OSError):  # gone meanwhile, or a folder that is only read
        if _is_ours(path.lstat()):
            path.unlink()
            return True
    return False


def _digest(key: str, values: NDArray[np.float32]) -> bytes:
    # with the name, so that a file that somebody renamed is another picture's
    digest = hashlib.sha256(f"{key} {values.shape}".encode())
    digest.update(values.data)
    return digest.digest()
