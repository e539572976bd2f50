"""Work that is done by whoever waits for it: one thread at a time, for all, and no thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mcv_runtime.decoding.job import Job
from mcv_runtime.errors import OptionError

_POLL_S = 0.05
"""How often who waits for another thread's work looks whether to go on."""


class SharedWork:
    """Threads and event loops wait here; one of them works on, a turn at a time, until what it waits for is there."""

    def __init__(self, turn: Callable[[], bool], expected: Callable[[], bool]) -> None:
        """`turn` does a little and says whether there was anything to do; `expected`: whether another one would."""
        self.changed = threading.Condition()
        """Held by who changes what others wait for; never while anything is computed."""
        self._turn, self._expected = turn, expected
        self._worker: int | None = None  # the thread that is at work
        self._awaited: set[Job] = set()
        self._awaited_by = False

    def wait(self, ready: Callable[[], bool], give_up: Callable[[], bool] | None = None) -> None:
        """Return when `ready`, or when `give_up`; work on whatever there is until then, if nobody else does."""
        while True:
            with self.changed:
                while not ready() and self._worker is not None:
                    self._refuse_within()
                    if give_up is not None and give_up():
                        return
                    self.changed.wait(None if give_up is None else _POLL_S)
                if ready() or (give_up is not None and give_up()):
                    return
                self._worker = threading.get_ident()
            try:
                idle = not self._turn()
            finally:
                self._rest()
            if idle:
                with self.changed:  # only another thread can change anything now
                    if not ready() and self._worker is None and not self._expected():
                        self.changed.wait(_POLL_S)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody works meanwhile: for what is done to things that requests share."""
        with self.changed:
            self._refuse_within()
            self.changed.wait_for(lambda: self._worker is None)
            self._worker = threading.get_ident()
        try:
            yield
        finally:
            self._rest()

    def work_for(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """See to it that a thread of the loop's executor works until the job is done; one for all that are awaited."""
        with self.changed:
            self._awaited.add(job)
            if self._awaited_by:
                return
            self._awaited_by = True
        loop.run_in_executor(None, self._work_for_awaited)

    def _work_for_awaited(self) -> None:
        try:
            while True:
                with self.changed:
                    self._awaited = {job for job in self._awaited if not job.done}
                    if not self._awaited:
                        self._awaited_by = False
                        return
                    job = next(iter(self._awaited))
                self.wait(lambda job=job: job.done)  # type: ignore[misc]
        except BaseException:
            with self.changed:
                self._awaited_by = False
                awaited, self._awaited = self._awaited, set()
            for job in awaited:
                job.wake()  # they look for another thread
            raise

    def _refuse_within(self) -> None:
        if self._worker == threading.get_ident():
            raise OptionError("the engine is at work in this very thread; ask it when that has returned")

    def _rest(self) -> None:
        with self.changed:
            self._worker = None
            self.changed.notify_all()
