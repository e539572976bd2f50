"""Encoded pictures in a folder, which several processes may share."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.errors import OutputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOG = logging.getLogger(__name__)
_SUFFIX = ".mcvpicture"
_HEADER = struct.Struct("<8s32sQQ")
"""Magic, sha256 of name, shape and values, rows, columns; float32 values follow, all little-endian."""
_MAGIC = b"MCVPIC01"
_ABANDONED_S = 3600
"""Age of a temporary file whose process must be gone."""


class PictureStore:
    """At most `limit_bytes` of encoded pictures, the least recently used deleted first; threads and processes may share it.

    An entry is written under another name and then renamed, so that nobody ever reads half of one. A damaged entry is deleted
    with a line in the log, and an entry that cannot be written is none: a cache never fails a request.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        self._folder, self._limit = Path(folder), limit_bytes
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the cache folder {folder} cannot be made ({error.strerror}); choose another") from error

    def get(self, key: str) -> NDArray[np.float32] | None:
        """The embeddings [visual tokens, hidden] of a picture, if they are here and whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("cached picture %s cannot be read (%s); encoding it again", path, error.strerror)
            return None
        embeds = _unpack(key, data)
        if embeds is None:
            _LOG.warning("cached picture %s is damaged; encoding it again", path)
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # deleted meanwhile, or a folder that is only read
            os.utime(path)  # used now
        return embeds

    def put(self, key: str, embeds: NDArray[np.float32]) -> None:
        """Keep the embeddings of a picture, and delete what is too much."""
        values = np.ascontiguousarray(embeds, "<f4")
        if _HEADER.size + values.nbytes > self._limit:
            return
        partial = self._folder / f".{key}.{secrets.token_hex(8)}"
        try:
            try:
                with partial.open("xb") as file:
                    file.write(_HEADER.pack(_MAGIC, _digest(key, values), *values.shape))
                    file.write(values.data)
                partial.replace(self._path(key))
            finally:
                partial.unlink(missing_ok=True)
            self._shrink()
        except OSError as error:
            _LOG.warning("the picture cache %s cannot be written (%s)", self._folder, error.strerror)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _shrink(self) -> None:
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(last use in ns, size, path) of all entries; what a process that died has left is deleted."""
        with os.scandir(self._folder) as files:
            for file in files:
                try:
                    stat = file.stat()
                except FileNotFoundError:  # another process is faster
                    continue
                if file.name.endswith(_SUFFIX):
                    yield stat.st_mtime_ns, stat.st_size, Path(file.path)
                elif file.name.startswith(".") and time.time() - stat.st_mtime > _ABANDONED_S:
                    Path(file.path).unlink(missing_ok=True)


def _unpack(key: str, data: bytes) -> NDArray[np.float32] | None:
    if len(data) < _HEADER.size:
        return None
    magic, digest, rows, columns = _HEADER.unpack_from(data)
    if magic != _MAGIC or len(data) != _HEADER.size + 4 * rows * columns:
        return None
    values = np.frombuffer(data, "<f4", offset=_HEADER.size).reshape(rows, columns)
    return values.astype(np.float32, copy=False) if _digest(key, values) == digest else None


def _digest(key: str, values: NDArray[np.float32]) -> bytes:
    # with the name, so that a file that somebody renamed is another picture's
    digest = hashlib.sha256(f"{key} {values.shape}".encode())
    digest.update(values.data)
    return digest.digest()
