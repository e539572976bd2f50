"""Files and folders that are not on this machine, `s3://bucket/scans` say, through fsspec, an extra.

Only stores whose addresses name one file each: none that follows where a server sends it on, no chains (`zip://...::s3://...`).
`file://` stands for a path of this machine.
"""

from __future__ import annotations

import errno
import posixpath
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from mcv_runtime.errors import McvError, OptionError, shown
from mcv_runtime.files import MakeError, open_regular

_SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
"""Of the stores, and the package that fsspec needs for each."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BLOCK = 4 << 20
"""Bytes that are asked for at a time."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file or folder of a store; nothing is asked of it before it is read."""

    scheme: str
    path: str
    """From the bucket or repository on, without a slash at its ends."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.path)[1]

    @property
    def parent(self) -> RemoteFile:
        return RemoteFile(self.scheme, posixpath.dirname(self.path))

    def joined(self, text: str) -> RemoteFile:
        """The file of that name in this folder or deeper; raises `OptionError` for what would lead out of it."""
        if not text or text.startswith("/") or ".." in text.split("/"):
            raise OptionError(f"{shown(text)} leads out of {self}; a row of a remote file names what lies beside it")
        return RemoteFile(self.scheme, posixpath.normpath(f"{self.path}/{text}"))

    def is_within(self, folder: RemoteFile) -> bool:
        return self.scheme == folder.scheme and (self.path == folder.path or self.path.startswith(f"{folder.path}/"))

    def exists(self) -> bool:
        with self._told(OptionError):
            return bool(_store(self.scheme).exists(self.path))

    def is_dir(self) -> bool:
        with self._told(OptionError):
            return bool(_store(self.scheme).isdir(self.path))

    def size(self) -> int:
        with self._told(OptionError):
            return int(_store(self.scheme).info(self.path)["size"])

    def entries(self) -> list[tuple[str, bool]]:
        """The names in a folder in their order, and whether each is a folder."""
        with self._told(OptionError):
            found = _store(self.scheme).ls(self.path, detail=True)
        named = {posixpath.basename(one["name"].rstrip("/")): one["type"] == "directory" for one in found}
        return sorted((name, is_folder) for name, is_folder in named.items() if name)

    def open(self) -> BufferedReader:
        """To read, anywhere in it, a block at a time; what goes wrong meanwhile is an `OSError`."""
        with self._told(OptionError):
            return BufferedReader(_Reader(_store(self.scheme).open(self.path, "rb", block_size=_BLOCK)), _BLOCK)

    def read(self, max_bytes: int, error: MakeError) -> bytes:
        """All of it; `error` for what is larger, or cannot be read."""
        with self._told(error), _store(self.scheme).open(self.path, "rb") as file:
            data: bytes = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise error(f"{self} has more than {max_bytes:,} bytes")
        return data

    def download(self, to: Path, error: MakeError) -> None:
        with self._told(error):
            _store(self.scheme).get_file(self.path, str(to))

    def upload(self, file: Path, error: MakeError) -> None:
        """Have the store hold what a file of this machine does."""
        with self._told(error):
            _store(self.scheme).put_file(str(file), self.path)

    def remove(self, error: MakeError) -> None:
        with self._told(error):
            if (store := _store(self.scheme)).exists(self.path):
                store.rm_file(self.path)

    @contextmanager
    def _told(self, error: MakeError) -> Iterator[None]:
        try:
            yield
        except (McvError, MemoryError):
            raise
        except FileNotFoundError:
            raise error(f"{self} is not there") from None
        except Exception as cause:  # each store has errors of its own, for what is forbidden, or a network that is away
            raise error(f"{self} cannot be used: {_reason(cause)}") from cause


class _Reader(RawIOBase):
    """A store's file, whose errors are those of files."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as cause:
            raise OSError(errno.EIO, _reason(cause)) from cause
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


Place: TypeAlias = Path | RemoteFile
"""What a batch names: on this machine, or not."""


def place_of(text: str) -> Place:
    """The file or folder that a path or an address means; raises `OptionError` for an address that is none of a store's."""
    found = _ADDRESS.match(text)
    if found is None:
        return Path(text)
    scheme = found[1].lower()
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise OptionError(f"{shown(text)} names another machine; a file of this one is file:///path")
        return Path(unquote(parts.path))
    if scheme not in _SCHEMES or "::" in text:
        known = ", ".join(f"{one}://" for one in (*_SCHEMES, "file"))
        raise OptionError(f"{shown(text)} is no address that is read here; those are {known}")
    path = text[found.end() :].strip("/")
    if not path or ".." in path.split("/"):
        raise OptionError(f"{shown(text)} names no file or folder")
    return RemoteFile(scheme, path)


def fetched_folders(texts: Iterable[str]) -> tuple[RemoteFile, ...]:
    """Folders of stores by their addresses; raises `OptionError` for what is none."""
    folders = tuple(map(place_of, texts))
    for folder in folders:
        if not isinstance(folder, RemoteFile):
            raise OptionError(f"{folder} is on this machine, where rows name files anyway; --fetch takes a store's folder")
    return folders  # type: ignore[return-value]


def is_store_address(text: str) -> bool:
    """Whether a text is the address of a store's file, and not of a page or the content itself."""
    found = _ADDRESS.match(text)
    return found is not None and found[1].lower() in _SCHEMES


def open_place(place: Place) -> BufferedReader:
    """A file to read, which is a plain one if it is on this machine; raises `OptionError`."""
    return place.open() if isinstance(place, RemoteFile) else open_regular(place, error=OptionError)


def _reason(cause: Exception) -> str:
    return next(iter(str(cause).splitlines()), "")[:300] or type(cause).__name__


@cache
def _store(scheme: str) -> Any:
    """fsspec's file system, or what to install, as an `OptionError`."""
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        needed = _SCHEMES[scheme]
        raise OptionError(f"{scheme}:// needs {needed}; install it with `pip install minicpmv-onnx[remote]`") from None
