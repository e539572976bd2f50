"""The folder that a build makes: what it may replace, two builds at once, what killed ones left, and the swap at the end.

A build writes into a sibling of OUT that it holds a lock on, and that takes OUT's name when all is there. A lock dies with its
process: a sibling without one was left by a killed build, and the next build of the same OUT removes it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcv_calibration.report import HTML_NAME, JSON_NAME
from mcv_runtime.bundle.manifest import FILE_NAME
from mcv_runtime.errors import McvError, OutputError, shown
from mcv_runtime.files import parse_json, read_text
from mcv_runtime.writing import sync, sync_folder

if sys.platform != "win32":
    import fcntl

_OWN = {FILE_NAME, JSON_NAME, HTML_NAME}
"""Files of a bundle that its manifest need not list; a report is unlisted while it is being replaced."""
_NO_REPLACE, _EXCHANGE = 1, 2
"""Flags of renameat2(2)."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)
"""What file systems answer that cannot lock folders or exchange names."""
_PATIENCE = 60.0
"""Seconds that a build waits for another that looks at the same folder; then it goes on, for somebody else holds the lock."""
_log = logging.getLogger(__name__)


def check_output(out: Path, checkpoint: Path, *, force: bool) -> Path:
    """Where OUT really is, links followed; raises `OutputError` where it may not be made or, with `force`, replaced.

    Replaced are bundles and empty folders: never a file, the checkpoint, or a folder with anything in it that is no part of
    a bundle.
    """
    with failures(out):
        place = Path(os.path.realpath(_named(out)))
        with _locked(place.parent):
            _restore(place)
            _require_replaceable(out, place, checkpoint, force)
    return place


@contextmanager
def output_folder(out: Path, checkpoint: Path, *, force: bool) -> Iterator[Path]:
    """A folder that becomes OUT when the block succeeds, and vanishes when it does not: OUT is always the old one or the new.

    Raises `OutputError` for what `check_output` refuses, where another build makes the same OUT, and for a disk that is full.
    """
    place = check_output(out, checkpoint, force=force)
    with failures(out), claimed_folder(place, ".partial") as partial:
        yield partial
        _sync(partial)
        with _locked(place.parent):
            _require_replaceable(out, place, checkpoint, force)  # something may have come there since
            if place.exists():
                _swap(partial, place)
            else:
                _rename(partial, place, _NO_REPLACE)
            sync_folder(place.parent)


@contextmanager
def claimed_folder(place: Path, suffix: str) -> Iterator[Path]:
    """A folder beside `place` that vanishes at the end; what killed builds of `place` left is removed first.

    It stays locked: a build into a folder right inside of it would wait for that lock.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent):
        _sweep(place)
        folder = place.parent / f".{place.name}.mcv-{secrets.token_hex(4)}{suffix}"
        folder.mkdir()
        lock = _lock(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        if lock is not None:
            os.close(lock)


def _named(out: Path) -> Path:
    if "\0" in str(out):
        raise OutputError(f"{shown(str(out))} is no name of a folder")
    return out


def _require_replaceable(out: Path, place: Path, checkpoint: Path, force: bool) -> None:
    if not os.path.lexists(place):
        return
    if checkpoint.resolve().is_relative_to(place):
        raise OutputError(f"{out} {'is' if checkpoint.resolve() == place else 'holds'} the checkpoint; choose another folder")
    if (reason := _kept_because(place)) is not None:
        raise OutputError(f"{out} {reason}; choose another folder")
    if not force:
        raise OutputError(f"{out} exists; choose another folder, or replace it with --force")


def _kept_because(place: Path) -> str | None:
    """Why this may not be replaced; None where it may."""
    if not place.is_dir():
        return "exists and is no folder"
    if place.samefile("."):
        return "is the current folder, which cannot be replaced while you are in it"
    if os.path.ismount(place):
        return "is where a disk is mounted, which cannot be replaced"
    files = _files(place)
    if not files:
        return None
    if FILE_NAME not in files:
        return "exists and is no bundle"
    try:
        manifest = parse_json(read_text(place / FILE_NAME, error=OutputError, within=place), FILE_NAME, error=OutputError)
        listed = manifest["files"].keys() | _OWN
    except (OutputError, LookupError, TypeError, AttributeError):
        return f"has a {FILE_NAME} that cannot be read, so that nobody knows what in it is a bundle's"
    foreign = sorted(files - listed)
    return f"holds {shown(foreign[0])}, which is no part of a bundle" if foreign else None


def _files(folder: Path) -> set[str]:
    """All but folders, as a manifest names them."""

    def refuse(error: OSError) -> None:
        raise error

    found: set[str] = set()
    for top, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(top, name).is_symlink()]
        found |= {Path(top, name).relative_to(folder).as_posix() for name in [*names, *links]}
    return found


def _siblings(place: Path, suffix: str) -> list[Path]:
    if not place.parent.is_dir():
        return []
    own = re.compile(rf"\.{re.escape(place.name)}\.mcv-\w+\.{suffix}")
    return [path for path in place.parent.iterdir() if own.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _sweep(place: Path) -> None:
    for left in _siblings(place, "(?:partial|search|old)"):
        try:
            lock = _lock(left)
        except BlockingIOError:
            raise OutputError(f"another build is making {place}; wait for it, or choose another folder") from None
        if lock is None:
            _log.warning("%s is of a build that was killed, or still runs; remove it if none does", left)
            continue
        _remove(left)
        os.close(lock)


def _swap(new: Path, place: Path) -> None:
    """Have the two change names; the old one's is then `new`."""
    try:
        _rename(new, place, _EXCHANGE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # A kill between these two leaves no OUT; `_restore` finds the old one by its name.
        old = new.with_suffix(".old")
        place.rename(old)
        try:
            new.rename(place)
        except BaseException:
            old.rename(place)
            raise
        old.rename(new)


def _restore(place: Path) -> None:
    """Put back what a build was replacing when it was killed, where the system cannot exchange names."""
    if not place.exists() and place.name and (old := _siblings(place, "old")):
        old[0].rename(place)


def _rename(source: Path, target: Path, flag: int) -> None:
    """renameat2(2), or where there is none and nothing to exchange, a plain rename."""
    call: Callable[..., int] | None = None
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        here = -100  # AT_FDCWD
        if call(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
            return
        number = ctypes.get_errno()
    else:
        number = errno.ENOSYS
    if flag == _EXCHANGE or number not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), str(target))
    source.rename(target)


def _lock(folder: Path) -> int | None:
    """An open handle that holds the folder's lock; None where there are no locks, `BlockingIOError` where another has it."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return handle


def _taken(handle: int) -> bool:
    """Whether the lock was free, and is ours now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(parent: Path) -> Iterator[None]:
    """Keep other builds from looking at what lies in `parent`, for a moment."""
    if sys.platform == "win32" or not parent.is_dir():
        yield
        return
    handle = os.open(parent, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        with suppress(OSError):  # where there are no locks, two builds at once may end in an error, not in a loss
            while not _taken(handle) and time.monotonic() < deadline:
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


@contextmanager
def failures(out: Path) -> Iterator[None]:
    """Say in one line what the system refused."""
    try:
        yield
    except OSError as error:
        if isinstance(error, McvError) or error.errno is None:
            raise
        what = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise OutputError(f"{out} cannot be written: {what}; nothing was kept") from None


def _sync(folder: Path) -> None:
    """Have all of a folder on the disk: a name must not outlive a power failure that its files do not."""
    for top, _, names in os.walk(folder):
        for name in names:
            with Path(top, name).open("r+b") as file:
                sync(file)
        sync_folder(Path(top))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.warning("%s could not be removed; remove it yourself", folder)
