"""Threads that share the work on a checkpoint's bytes: numpy and hashlib compute, read and write without Python's lock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

from mcv_runtime.sessions.cores import default_threads


@contextmanager
def workers(threads: int | None = None) -> Iterator[Executor]:
    """A pool, by default with a thread for each core; what has not begun when the block ends never will."""
    pool = ThreadPoolExecutor(threads or default_threads() or os.cpu_count() or 1, thread_name_prefix="mcv-export")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
