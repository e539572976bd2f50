"""Whether another process is at work on a file: a lock that ends with whoever holds it, however he ends."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import fcntl


def try_lock(fd: int) -> bool | None:
    """Take the lock of an open file until it is closed: True; False: another has it; None: there are no locks there."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without
        return None
    return True
