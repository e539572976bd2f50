"""Files that are there whole or not at all, and still so after a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""What a file system answers that writes folders when it likes."""


@contextmanager
def replacing(path: Path, *, partial: Path | None = None, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A new file, to read and write, that takes the name once it is written and on the disk; a failure leaves nothing.

    Until then its name is `partial`, or else `.NAME.` with random digits, so that any number of processes may do so at once.
    Raises `OSError`.
    """
    partial = partial or path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "x+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            sync(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(file: BinaryIO) -> None:
    """Have what was written outlive the system."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlive the system."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)
