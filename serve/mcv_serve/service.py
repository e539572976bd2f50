"""The engine, and all that is asked of it: queued, prepared, computed, joined where it is the same, and given up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from mcv_runtime import Engine, Event, McvError, Options, Prompt, Request, Ticket
from mcv_runtime.pictures.images import MAX_PIXELS
from mcv_serve.admission import Admission
from mcv_serve.answering import Answering
from mcv_serve.asked import Asked, FrameUrls
from mcv_serve.errors import ApiError
from mcv_serve.isolated import IsolatedDecoder
from mcv_serve.metrics import Metrics
from mcv_serve.pictures import Decode, messages_of
from mcv_serve.remote import Fetcher
from mcv_serve.settings import Settings

_LOG = logging.getLogger(__name__)
_PREPARING, _FETCHING = 2, 4
"""Threads that decode pictures and write prompts, and in which pictures are fetched besides."""
Result = TypeVar("Result")


class Service:
    """One engine for many clients. All but `prepared` belongs to the event loop's thread.

    The engine's tickets have one thread of the loop's executor step the scheduler for all of them. That executor has this
    one thread and no other work; it is idle when nothing is asked.
    """

    def __init__(self, engine: Engine, settings: Settings, *, max_pixels: int = MAX_PIXELS) -> None:
        """`max_pixels`: of the engine's pictures."""
        self.engine, self.settings = engine, settings
        self.model = settings.model_name or engine.bundle.manifest.model
        self.metrics = Metrics(self.model)
        self.started = time.time()
        self.admission = Admission(settings.concurrent, settings.queue)
        self.answering: dict[int, Answering] = {}
        """All that are queued or computed, by number."""
        self.stepping = ThreadPoolExecutor(1, "mcv-engine")
        self._pool = ThreadPoolExecutor(_PREPARING + (_FETCHING if settings.image_hosts else 0), "mcv-prepare")
        self._same: dict[str, Answering] = {}
        self._held = 0
        """Bytes of texts and pictures of all those."""
        self._isolated = IsolatedDecoder(max_pixels) if settings.isolate else None
        self._decode: Decode = bytes if self._isolated is None else self._isolated
        self._picture_bytes = int(settings.picture_mb * 1e6)
        self._fetcher = Fetcher(settings.image_hosts, limit=self._picture_bytes, seconds=settings.fetch_s)
        self._finished = 0
        """Requests that ended with an answer, and of these, how many the saved state knows."""
        self._saved = 0
        self._load_state()

    async def in_pool(self, work: Callable[..., Result], *given: Any) -> Result:
        """Do what takes long in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *given)

    def listen(self, asked: Asked, client: str, key: str | None = None) -> Answering:
        """Begin to answer, or take part in the answer to an equal request that is under way; `leave` it in any case.

        `key` is equal for equal requests. Raises `ApiError` where no more are taken.
        """
        self.check(asked)
        size = sum(len(part) if isinstance(part, str) else part.size for turn in asked.turns for part in turn.parts)
        same = self._same.get(key) if key is not None and asked.deterministic else None
        if same is not None and not same.done:
            self.metrics.note_joined()
            same.listeners += 1
            return same
        self.admission.check()
        if self._held + size > self.settings.queue_mb * 1e6 and self.answering:
            retry = self.admission.retry_after
            raise ApiError(429, "queue_full", "what waits takes all the memory that is meant for it", retry_after=retry)
        self._held += size
        answering = Answering(asked, deadline=time.monotonic() + self.settings.deadline_s)
        answering.listeners = 1
        self.answering[answering.number] = answering
        if key is not None and asked.deterministic:
            self._same[key] = answering
        answering.task = asyncio.get_running_loop().create_task(self._answer(answering, client))
        answering.task.add_done_callback(lambda _: self._over(answering, size))
        return answering

    def leave(self, answering: Answering) -> None:
        """Somebody listens no more; when nobody does, the computation ends at the next token."""
        answering.listeners -= 1
        if not answering.listeners and not answering.done:
            self.metrics.note_gone()
            self._forget_same(answering)
            answering.stop.set()
            if answering.task is not None:
                answering.task.cancel()

    def _over(self, answering: Answering, size: int) -> None:
        """However it ended, even before it began."""
        if not answering.done:
            answering.finish(None, ApiError(499, "client_gone", "the client is gone"))
        self._held -= size
        del self.answering[answering.number]
        self._forget_same(answering)

    def _forget_same(self, answering: Answering) -> None:
        for key in [key for key, other in self._same.items() if other is answering]:
            del self._same[key]

    def check(self, asked: Asked) -> None:
        """Raise `ApiError` for what is beyond the limits."""
        if len(asked.visuals) > self.settings.pictures:
            most = self.settings.pictures
            raise ApiError(400, "too_many_images", f"a request may have {most} pictures, not {len(asked.visuals)}")
        if self.settings.isolate and any(not isinstance(one, FrameUrls) and one.is_video for one in asked.visuals):
            raise ApiError(400, "video_files_disabled", "this server takes videos as lists of frames alone (--isolate)")
        tokens, most_tokens = asked.options.get("max_new_tokens"), self.settings.max_tokens
        if tokens is not None and most_tokens is not None and tokens > most_tokens:
            raise ApiError(400, "invalid_value", f"an answer may have {most_tokens} tokens, not {tokens}", param="max_tokens")

    async def _answer(self, answering: Answering, client: str) -> None:
        place: float | None = None
        try:
            try:
                async with asyncio.timeout_at(self._loop_time(answering.deadline)):
                    place = await self.admission.enter(client)
            except TimeoutError:
                raise _late() from None
            answering.admitted = time.monotonic()
            answering.state = "preparing"
            ticket = await self.in_pool(self._submit, answering)
            answering.state = "reading"
            answering.wake()
            async for piece in ticket:
                answering.add(piece)
            answer = await ticket
            if answer.stop_reason == "timeout" and not answer.text:
                raise _late()
            self._finished += 1
            self.metrics.note_answer(answering, answer, time.monotonic())
            answering.finish(answer)
        except asyncio.CancelledError:
            gone = ApiError(499, "client_gone", "the client is gone")
            closed = ApiError(503, "shutting_down", "the server is shutting down; ask again in a while", retry_after=10.0)
            answering.finish(None, closed if self.admission.closed else gone)
        except Exception as error:
            refused = ApiError.of(error)
            if refused.status >= 500 and refused.code != "deadline_exceeded":
                _LOG.error(
                    "request %d failed: %s", answering.number, type(error).__name__, exc_info=_trace(error, self.settings)
                )
            answering.finish(None, refused)
        finally:
            if place is not None:
                self.admission.leave(place)

    def _loop_time(self, deadline: float) -> float:
        return asyncio.get_running_loop().time() + deadline - time.monotonic()

    def _submit(self, answering: Answering) -> Ticket:
        """In a thread of the pool: make the pictures and the prompt ready, and hand the request in."""
        asked = answering.asked
        left = max(answering.deadline - time.monotonic(), 0.001)
        options = self.options(asked, timeout=left, cancel=answering.stop, progress=_Listener(answering))
        with messages_of(asked, self._fetch, self._decode, self._picture_bytes) as messages:
            return self.engine.submit(Request(messages=messages, options=options))

    def _fetch(self, url: str) -> bytes:
        with self.metrics.fetch_s.time():
            return self._fetcher(url)

    def options(self, asked: Asked, **more: Any) -> Options:
        """The runtime's options of a request."""
        return Options.of(None, {**asked.options, **more})

    def prepared(self, asked: Asked) -> Prompt:
        """A request's prompt; in a thread of the pool."""
        with messages_of(asked, self._fetch, self._decode, self._picture_bytes) as messages:
            return self.engine.prompt(messages, options=self.options(asked))

    def _load_state(self) -> None:
        path = self.settings.state
        if path is None or not path.exists():
            return
        try:
            _LOG.info("%d beginnings are known from before", self.engine.load_state(path))
        except McvError as error:  # a state is a help, not a need
            _LOG.warning("%s", error)

    def _save_state(self) -> None:
        finished, path = self._finished, self.settings.state
        if path is None or finished == self._saved:
            return
        try:
            self.engine.save_state(path)
            self._saved = finished
        except McvError as error:
            _LOG.warning("%s", error)

    async def save_state_when_idle(self) -> None:
        """Now and then, as long as this is awaited, so that a killed process leaves something."""
        while True:
            await asyncio.sleep(self.settings.save_s)
            if not self.answering:
                await self.in_pool(self._save_state)

    def metrics_text(self) -> bytes:
        """For Prometheus."""
        self.metrics.note_load(self.admission.running, self.admission.queued, asdict(self.engine.memory()))
        return self.metrics.text()

    async def drain(self, seconds: float) -> bool:
        """Take no more, and wait for what is under way; False if something was not finished in time and had to end."""
        self.admission.closed = True
        tasks = [one.task for one in self.answering.values() if one.task is not None]
        if not tasks:
            return True
        _, pending = await asyncio.wait(tasks, timeout=seconds)
        for one in list(self.answering.values()):
            one.stop.set()
            if one.task is not None:
                one.task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=5.0)
        return not pending

    def close(self) -> None:
        """Let go of the threads and the engine, after what was read is saved."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.stepping.shutdown(wait=True, cancel_futures=True)
        self._save_state()
        if self._isolated is not None:
            self._isolated.close()
        self.engine.close()


class _Listener:
    """The runtime's progress of one request; called in the event loop's thread."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def __call__(self, event: Event) -> None:
        self._answering.tell(event)


def _late() -> ApiError:
    return ApiError(503, "deadline_exceeded", "the request's time was up before there was an answer", retry_after=30.0)


def _trace(error: BaseException, settings: Settings) -> Any:
    """A traceback's last line may quote what was asked."""
    return error if settings.log_content else None
