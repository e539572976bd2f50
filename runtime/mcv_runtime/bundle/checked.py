"""Which large files were compared with their sha256 before: that takes seconds for gigabytes, and once is enough.

What is remembered of a file is its place, its size and its times, in the user's cache folder. A cache that cannot be written
costs the time again, and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Collection
from functools import cache
from pathlib import Path

from mcv_runtime.files import at_home, read_regular
from mcv_runtime.writing import replacing

_KNOWN_BYTES = 1 << 16
_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """`$MCV_CACHE`, else where this system keeps what may be deleted; None for a user without a home."""
    if chosen := os.environ.get("MCV_CACHE"):
        return at_home(chosen)
    system = platform.system()
    if system == "Windows" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "mcv" / "Cache"
    if system != "Darwin" and (chosen := os.environ.get("XDG_CACHE_HOME")):
        return Path(chosen) / "mcv"
    try:
        return Path.home() / ("Library/Caches" if system == "Darwin" else ".cache") / "mcv"
    except RuntimeError:
        return None


@cache
def code_version() -> str:
    """Whose results a cache holds: a part of its keys, so that what another version kept is not found."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version("minicpmv-onnx")
    except PackageNotFoundError:  # a copy of the sources alone
        return ""


def file_key(path: Path, sha256: str) -> str:
    """Tells a file from any other, and from itself once it was written to."""
    real = Path(os.path.realpath(path))
    status = real.stat()
    told = (str(real), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256)
    return hashlib.sha256(repr(told).encode(errors="surrogatepass")).hexdigest()


def known(bundle: Path) -> frozenset[str]:
    """The keys of the bundle's files that were right."""
    try:
        path = _entry(bundle)
        if path is None:
            return frozenset()
        if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
            return frozenset()  # somebody else's word
        return frozenset(read_regular(path, error=OSError, within=path.parent, max_bytes=_KNOWN_BYTES).decode().split())
    except (OSError, ValueError):
        return frozenset()


def remember(bundle: Path, keys: Collection[str]) -> None:
    """Have `known` say these from now on."""
    try:
        path = _entry(bundle)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(path) as file:
            file.write("\n".join(sorted(keys)).encode("ascii"))
    except (OSError, ValueError) as error:
        _log.debug("%s is hashed again next time: %s", bundle, error)


def _entry(bundle: Path) -> Path | None:
    folder = cache_folder()
    name = hashlib.sha256(os.path.realpath(bundle).encode(errors="surrogatepass")).hexdigest()
    return None if folder is None else folder / "checked" / name
