"""Files of a batch, of which one process writes one at a time."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mcv_runtime.errors import OutputError
from mcv_runtime.writing import replacing, sync_folder


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name, from another one too, once it is written and on the disk; a failure leaves nothing.

    Until then it is `NAME.partial`: only who holds the batch's lock writes there, so what is there was left by a killed run.
    """
    partial = path.with_name(f"{path.name}.partial")
    if is_there(partial):
        partial.unlink()
    with replacing(path, partial=partial, mode=0o666) as file:
        yield file
    sync_folder(path.parent)


def is_there(path: Path) -> bool:
    """Whether there is such a file; raises `OutputError` for a pipe, a device, a folder or a link."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        said = "a folder; name a file in it" if stat.S_ISDIR(mode) else "no plain file; name another for the answers"
        raise OutputError(f"{path} is {said}")
    return True
