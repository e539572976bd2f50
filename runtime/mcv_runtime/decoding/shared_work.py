"""Work that is done by whoever waits for it: one thread at a time, for all, and no thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mcv_runtime.decoding.job import Job
from mcv_runtime.errors import OptionError

if TYPE_CHECKING:
    import asyncio

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
        self._awaited: dict[asyncio.AbstractEventLoop, set[Job]] = {}  # a thread of the loop's executor works for these

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
        """See to it that a thread of the loop's executor works until the job is done; one for all that the loop awaits."""
        with self.changed:
            if loop in self._awaited:
                self._awaited[loop].add(job)
                return
            self._awaited[loop] = {job}
        try:
            working = loop.run_in_executor(None, self._work_for_awaited, loop)
        except BaseException:  # the executor was shut down
            self._look_for_another(loop)
            raise
        working.add_done_callback(lambda ended: self._look_for_another(loop) if ended.cancelled() else None)

    def _work_for_awaited(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                with self.changed:
                    jobs = self._awaited[loop] = {job for job in self._awaited[loop] if not job.done}
                    if not jobs:
                        del self._awaited[loop]
                        return
                    job = next(iter(jobs))
                self.wait(lambda job=job: job.done)  # type: ignore[misc]
        except BaseException:
            self._look_for_another(loop)
            raise

    def _look_for_another(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread that was to work is lost: who awaits asks for another one, and hears why there is none."""
        with self.changed:
            jobs = self._awaited.pop(loop, set())
        for job in jobs:
            job.wake()

    def _refuse_within(self) -> None:
        if self._worker == threading.get_ident():
            raise OptionError("the engine is at work in this very thread; ask it when that has returned")

    def _rest(self) -> None:
        with self.changed:
            self._worker = None
            self.changed.notify_all()
