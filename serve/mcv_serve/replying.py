"""Answers on their way to a client: as server-sent events, as lines of JSON, or whole; and noticing that it is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from mcv_runtime import Answer, Piece
from mcv_serve.answering import Answering
from mcv_serve.asked import Asked
from mcv_serve.errors import ApiError, Dialect
from mcv_serve.service import Service

_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
Lines = AsyncIterator[Any]
"""JSON values, or None where nothing is to be said."""


def client_of(request: Request) -> str:
    """Who asks, for turns in the queue: by its key, or by its address."""
    key = getattr(request.state, "key", None)
    return str(key) if key else (request.client.host if request.client else "")


@contextmanager
def listening(service: Service, asked: Asked, request: Request, key: str | None) -> Iterator[Answering]:
    """Take part in the answer as long as the block runs."""
    answering = service.listen(asked, client_of(request), key)
    try:
        yield answering
    finally:
        service.leave(answering)


async def whole(service: Service, asked: Asked, request: Request, key: str | None) -> tuple[Answering, Answer]:
    """The finished answer; given up when the client is gone."""
    with listening(service, asked, request, key) as answering:
        finished = asyncio.ensure_future(answering.finished())
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait([finished, gone], return_when=asyncio.FIRST_COMPLETED)
            if not finished.done():
                raise ApiError(499, "client_gone", "the client is gone")
            return answering, finished.result()
        finally:
            for task in (finished, gone):
                task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def streamed(
    service: Service,
    asked: Asked,
    request: Request,
    key: str | None,
    write: Callable[[Answering, AsyncIterator[Piece | str | None]], Lines],
    dialect: Dialect,
) -> StreamingResponse:
    """A response that gives out what `write` makes of the pieces, None standing for a silence.

    What is refused soon gets a status that says so; later, when the response has begun, an error as its last line.
    """
    answering = service.listen(asked, client_of(request), key)
    try:
        gone = asyncio.ensure_future(_gone(request))
        begun = asyncio.ensure_future(answering.begun(service.settings.keep_alive_s))
        try:
            await asyncio.wait([gone, begun], return_when=asyncio.FIRST_COMPLETED)
            if not begun.done():
                raise ApiError(499, "client_gone", "the client is gone")
            begun.result()
        finally:
            gone.cancel()
            begun.cancel()
    except BaseException:
        service.leave(answering)
        raise
    kind = "text/event-stream" if dialect == "openai" else "application/x-ndjson"
    return _Leaving(service, answering, write, dialect, media_type=kind, headers=_UNBUFFERED)


class _Leaving(StreamingResponse):
    """Leaves the computation however the response ends, even one that never began."""

    def __init__(
        self, service: Service, answering: Answering, write: Callable[..., Lines], dialect: Dialect, **more: Any
    ) -> None:
        self._service, self._answering = service, answering
        super().__init__(_lines(service, answering, write, dialect), **more)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.leave(self._answering)


async def _lines(service: Service, answering: Answering, write: Callable[..., Lines], dialect: Dialect) -> AsyncIterator[bytes]:
    try:
        async for value in write(answering, answering.stream(service.settings.keep_alive_s)):
            if value is None:
                yield b": keep-alive\n\n"
            else:
                yield line(value, dialect)
    except Exception as error:
        refused = ApiError.of(error)
        service.metrics.note_refused(refused.code)
        yield line(refused.body(dialect), dialect)
    if dialect == "openai" and answering.asked.kind != "responses":
        yield b"data: [DONE]\n\n"


def line(value: Any, dialect: Dialect) -> bytes:
    """One value of a stream; a pair is an event with a name."""
    if dialect == "ollama":
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    name = b""
    if isinstance(value, tuple):
        event, value = value
        name = f"event: {event}\n".encode()
    return name + b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
