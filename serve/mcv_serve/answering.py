"""One computation and whoever listens to it: several, where the same thing was asked while it runs."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from typing import Literal

from mcv_runtime import Answer, Event, Piece
from mcv_serve.asked import Asked

State = Literal["queued", "preparing", "reading", "answering", "done"]
_numbers = itertools.count()


class Answering:
    """How far one computation is. Only the event loop's thread touches it, but for `stop`, which the pool reads."""

    def __init__(self, asked: Asked, *, deadline: float) -> None:
        self.asked, self.deadline = asked, deadline
        self.number = next(_numbers)
        self.created = time.time()
        self.began = time.monotonic()
        self.admitted: float | None = None
        self.first_piece: float | None = None
        self.state: State = "queued"
        self.read, self.prompt_tokens = 0, 0
        """Of the prompt, as far as is known."""
        self.slices = 0
        """That had to be encoded."""
        self.pictures_known = 0
        """That had not."""
        self.tokens = 0
        """Made so far."""
        self.pieces: list[Piece | str] = []
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.stop = threading.Event()
        """Set once nobody listens any more."""
        self.task: asyncio.Task[None] | None = None
        self.listeners = 0
        self._changed: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        return self.state == "done"

    def tell(self, event: Event) -> None:
        """The runtime's progress."""
        if event.stage == "slices":
            self.slices = max(self.slices, event.total)
        elif event.stage == "pictures" and not self.slices:
            self.pictures_known = event.done
        elif event.stage == "prompt":
            self.state, self.read, self.prompt_tokens = "reading", event.done, event.total
            self.wake()
        elif event.stage == "answer":
            self.tokens = event.done

    def add(self, piece: Piece | str) -> None:
        """More text."""
        if self.first_piece is None:
            self.first_piece = time.monotonic()
        self.state = "answering"
        self.pieces.append(piece)
        self.wake()

    def finish(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """There is no more."""
        self.answer, self.error, self.state = answer, error, "done"
        self.wake()

    def wake(self) -> None:
        """Let listeners look again."""
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None

    async def news(self, seconds: float | None = None) -> bool:
        """Wait until something changes; False if nothing did for so long."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait([self._changed], timeout=seconds)
        return bool(done)

    async def begun(self, seconds: float) -> None:
        """Wait until the request is known to be a good one, or for so long; raises what is wrong with it."""
        until = time.monotonic() + seconds
        while self.state in ("queued", "preparing") and (left := until - time.monotonic()) > 0:
            await self.news(left)
        if self.error is not None:
            raise self.error

    async def finished(self) -> Answer:
        """The answer; raises what went wrong."""
        while not self.done:
            await self.news()
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer

    async def stream(self, silence_s: float) -> AsyncIterator[Piece | str | None]:
        """The pieces from the first on, None after each `silence_s` without one; raises what goes wrong."""
        given = 0
        told = time.monotonic()
        while True:
            if given < len(self.pieces):
                given += 1
                told = time.monotonic()
                yield self.pieces[given - 1]
            elif self.done:
                if self.error is not None:
                    raise self.error
                return
            else:
                await self.news(max(told + silence_s - time.monotonic(), 0.001))
                if given == len(self.pieces) and not self.done and time.monotonic() >= told + silence_s:
                    told = time.monotonic()
                    yield None
