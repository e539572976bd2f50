"""Threads that share the work on a checkpoint's bytes: numpy and hashlib compute, read and write without Python's lock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from mcv_runtime.sessions.cores import default_threads

PATIENCE_S = 5.0
"""How long threads are waited for after a signal."""


@contextmanager
def workers(threads: int | None = None) -> Iterator[Executor]:
    """A pool, by default with a thread for each core; what has not begun when the block ends never will."""
    pool = _Pool(threads or default_threads() or os.cpu_count() or 1)
    patience = None
    try:
        yield pool
    except BaseException as error:
        patience = None if isinstance(error, Exception) else PATIENCE_S
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        pool.join(patience)


class _Pool(Executor):
    """As `ThreadPoolExecutor`, whose process cannot end before its threads do.

    A signal raises its exception wherever the main thread is, also between taking a lock and the block that gives it back: a
    thread that wants that lock then waits for ever, and Ctrl-C would not end a build.
    """

    def __init__(self, threads: int) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [Thread(target=self._run, name=f"mcv-export_{number}", daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while cancel_futures:
            try:
                given = self._work.get_nowait()
            except Empty:
                break
            if given is not None:
                given[0].cancel()
        for _ in self._threads:
            self._work.put(None)
        if wait:
            self.join(None)

    def join(self, seconds: float | None) -> None:
        """Wait until the threads have ended, at most so long."""
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0))

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            future, work = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del given, future, work  # what they hold is not kept until the next one comes
