"""Statistics on disk, under a hash of everything they depend on: calibration goes on where it was, or need not run at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcv_runtime.bundle.checked import cache_folder, code_version
from mcv_runtime.files import open_regular
from mcv_runtime.writing import replacing

_FORMAT = "1"
"""Of the statistics; another number and nothing kept before is found."""
_ABANDONED = 24 * 3600
"""Seconds after which what a killed process was writing is nobody's."""
KEPT_BYTES = 8 << 30
"""Of each kind of entries: statistics take megabytes, a decoder's quantized blocks gigabytes."""
_IN_USE = 3600
"""Seconds since its last use in which an entry may be some other build's."""
_ENTRY = re.compile(r"[0-9a-f]{64}(\.npz)?")
_log = logging.getLogger(__name__)


def fingerprint(files: Iterable[Path]) -> str:
    """Of a checkpoint: its files' names, sizes and times, because gigabytes take too long to hash."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return content_hash(repr(stats))


def content_hash(*parts: str) -> str:
    """A hash that no other list of parts has."""
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode(errors="surrogatepass")).hexdigest()


def make_room(folder: Path, limit: int = KEPT_BYTES) -> None:
    """Remove the entries of `folder`, files or folders, that were used longest ago, until they fit into `limit` bytes."""
    entries = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _ENTRY.fullmatch(path.name) and not path.is_symlink():
                files = list(path.iterdir()) if path.is_dir() else [path]
                entries.append((path.stat().st_mtime, sum(file.stat().st_size for file in files), path))
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if total <= limit or used > time.time() - _IN_USE:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        total -= size


def mark_used(path: Path) -> None:
    """Have `make_room` know that an entry is of use."""
    with contextlib.suppress(OSError):
        os.utime(path)


class Store:
    """A folder of named arrays. `origin` tells apart what is measured: the checkpoint's `fingerprint` and the graph's name.

    `every` is after how many samples a calibration that is under way is kept. A folder that cannot be written, or that a user
    without a home has not, is warned of once and then done without.
    """

    def __init__(self, origin: str, folder: Path | None = None, *, every: int = 8) -> None:
        self._origin, self.every = origin, every
        cache = cache_folder() if folder is None else None
        self._folder = folder if cache is None else cache / "calibration"
        self._writable = True

    def key(self, *parts: str) -> str:
        """The name of an entry that depends on `origin` and these parts."""
        return content_hash(_FORMAT, code_version(), np.__version__, self._origin, *parts)

    def load(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays of an entry; None if there is none, or it is damaged and has been removed."""
        if self._folder is None or not (path := self._folder / f"{key}.npz").exists():
            return None
        try:
            whole = open_regular(path, error=OSError, within=path.parent)
            with whole as file, np.load(file, allow_pickle=False) as arrays:  # reading checks each array's CRC
                found = {name: arrays[name] for name in arrays.files}
            mark_used(path)
            return found
        except Exception as error:  # of an archive that is none, numpy and zipfile raise anything
            _log.warning("%s is damaged (%s) and is measured again", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def save(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace an entry as a whole: whoever reads sees the old one or the new one."""
        if not self._writable:
            return
        if self._folder is None:
            self._writable = False
            _log.warning("there is no home folder, and MCV_CACHE is not set: this calibration cannot be continued later")
            return
        path = self._folder / f"{key}.npz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(f".{path.name}.*"):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
            with replacing(path) as file:
                np.savez(file, allow_pickle=False, **arrays)
            make_room(self._folder)
        except OSError as error:
            self._writable = False
            _log.warning("%s cannot be written (%s): this calibration cannot be continued later", self._folder, error)
