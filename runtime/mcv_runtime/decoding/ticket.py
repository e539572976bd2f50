"""Tickets, for those who asked: the answer's text as it is made, and the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any

from mcv_runtime.decoding.job import Job
from mcv_runtime.decoding.scheduler import Scheduler
from mcv_runtime.errors import RunError
from mcv_runtime.request.answer import Answer


class Ticket(Iterator[str], AsyncIterator[str]):
    """One request on its way. Iterate over it for pieces of text, ask for its `result`, or await either.

    `answer = yield from ticket` and `answer = await ticket` give the answer too. Nothing is computed while nobody waits for any
    ticket of the engine; who waits for one works on all. A ticket that is forgotten is cancelled.
    """

    def __init__(self, scheduler: Scheduler, job: Job) -> None:
        self._scheduler, self._job = scheduler, job

    def __next__(self) -> str:
        """The next piece of text; the answer is the value of the `StopIteration` at the end."""
        job = self._job
        while True:
            self._scheduler.work.wait(lambda: bool(job.pieces or job.events or job.done))
            self._tell()
            with suppress(IndexError):  # another thread was faster
                return job.pieces.popleft()
            if job.done and not job.events:
                raise StopIteration(self._outcome())

    def result(self) -> Answer:
        """The answer, once it is finished; raises what went wrong with the request."""
        job = self._job
        while not job.done or job.events:
            self._scheduler.work.wait(lambda: bool(job.events or job.done))
            self._tell()
        return self._outcome()

    @property
    def done(self) -> bool:
        """Whether the answer is there, or what went wrong."""
        return self._job.done

    def cancel(self) -> None:
        """End the answer as far as it is, with the `stop_reason` `cancelled`."""
        self._job.cancelled = True

    def close(self) -> None:
        """Nobody wants the answer any more."""
        self._job.abandoned = True

    def __del__(self) -> None:
        job = getattr(self, "_job", None)  # there is none where making it has failed
        if job is not None:
            job.abandoned = True

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._finished().__await__()

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> str:
        job = self._job
        while True:
            await self._news(lambda: bool(job.pieces or job.events or job.done))
            self._tell()
            with suppress(IndexError):
                return job.pieces.popleft()
            if job.done and not job.events:
                self._outcome()
                raise StopAsyncIteration

    async def _finished(self) -> Answer:
        job = self._job
        while True:
            await self._news(lambda: bool(job.events or job.done))
            self._tell()
            if job.done and not job.events:
                return self._outcome()

    async def _news(self, ready: Callable[[], bool]) -> None:
        """Wait without blocking the event loop; one thread of its executor works for all that are awaited."""
        import asyncio  # who awaits has it already; for others it is slow to import

        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(woken.set)

        self._job.wakers.append(wake)
        try:
            while not ready():
                self._scheduler.work.work_for(self._job, loop)
                await woken.wait()
                woken.clear()
        except asyncio.CancelledError:
            if self._job.wakers == [wake]:  # no other coroutine waits for the same answer
                self.cancel()
            raise
        finally:
            self._job.wakers.remove(wake)

    def _tell(self) -> None:
        """Call the request's `progress`, in the thread that waits for it; what it raises ends the request."""
        job = self._job
        while True:
            try:
                event = job.events.popleft()
            except IndexError:
                return
            progress = job.progress
            if progress is None:  # it has raised; another thread may still have reported
                continue
            try:
                progress(event)
            except BaseException as error:
                job.progress, job.raised, job.abandoned = None, error, True
                raise

    def _outcome(self) -> Answer:
        error = self._job.raised or self._job.error
        if error is not None:
            raise error
        if self._job.answer is None:
            raise RunError("the request has no answer")
        return self._job.answer


def finish_first(tickets: Sequence[Ticket]) -> None:
    """Wait until the first of one asker's tickets is done, calling the `progress` of all; errors stay for their `result`."""
    jobs = [ticket._job for ticket in tickets]
    first = jobs[0]
    while not first.done or first.events:
        tickets[0]._scheduler.work.wait(lambda: first.done or any(job.events for job in jobs))
        for ticket in tickets:
            with suppress(Exception):
                ticket._tell()
