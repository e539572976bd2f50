"""The service on Ray Serve, an extra: replicas with an engine each, and the same picture to the replica that knows it.

    serve run mcv_serve.ray_app:build bundle=/models/my-bundle threads=4 max_replicas=8

In front stands a deployment that reads a request's body and hands it to a replica, chosen by the first picture (by Serve's
multiplexing, a picture's digest in the place of a model's name): one that has had the picture before, or else the one that has
the least to do. How many there are goes by how many requests each is at.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from mcv_runtime import OptionError, load
from mcv_serve.app import create_app
from mcv_serve.errors import ApiError, dialect_of
from mcv_serve.picture_key import picture_key
from mcv_serve.service import Service
from mcv_serve.settings import Settings

_PICTURES = 256
"""Pictures of a replica that are known to be there."""
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
_NUMBERS = {"threads": 4, "min_replicas": 1, "max_replicas": 1, "concurrent": 16, "queue": 64}
"""What `build` takes beside `bundle` and `api_key`, and what is if it is not given."""


class Replica:
    """One engine, and the application that `mcv-serve` has."""

    def __init__(self, bundle: str | None, threads: int, settings: Settings) -> None:
        self._service = Service(load(bundle, threads=threads, max_rows=settings.concurrent), settings)
        self._app = create_app(self._service)

    @serve.multiplexed(max_num_models_per_replica=_PICTURES)  # type: ignore[untyped-decorator, unused-ignore]
    async def picture(self, key: str) -> str:
        """Note that a picture is here; the engine's cache has what it needs."""
        return key

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """What the application sends; who asked is taken to be gone when nobody takes it any more."""
        if key := serve.get_multiplexed_model_id():
            await self.picture(key)
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received = iter([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.Event()

        async def receive() -> Message:
            if (message := next(received, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app({**scope, "extensions": {}}, receive, sent.put)
            finally:
                sent.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await running
        finally:
            gone.set()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


class Front:
    """Takes requests, and chooses a replica for each."""

    def __init__(self, replicas: Any, body_bytes: int) -> None:
        self._replicas, self._body_bytes = replicas, body_bytes

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._body_bytes:
                large = ApiError(413, "body_too_large", f"a request may have {self._body_bytes:,} bytes")
                return large.response(dialect_of(request.url.path))
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        chosen = self._replicas.options(stream=True, multiplexed_model_id=picture_key(bytes(body)))
        messages = chosen.answer.remote(scope, bytes(body))
        start = await anext(messages)

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for message in messages:
                    yield message.get("body", b"")
            finally:
                messages.cancel()  # nothing, where all was said

        response = StreamingResponse(pieces(), status_code=start["status"])
        response.raw_headers = list(start["headers"])
        return response


def build(arguments: dict[str, str]) -> Any:
    """The application for `serve run` and for Serve's files; raises `OptionError` for what it does not know."""
    for name in sorted(arguments.keys() - {"bundle", "api_key", *_NUMBERS}):
        raise OptionError(f"there is no argument {name}; there are bundle, api_key, {', '.join(_NUMBERS)}")
    try:
        given = {name: int(arguments.get(name, number)) for name, number in _NUMBERS.items()}
    except ValueError as error:
        raise OptionError(f"{', '.join(_NUMBERS)} are whole numbers: {error}") from None
    keys = (arguments["api_key"],) if "api_key" in arguments else ()
    settings = Settings(api_keys=keys, concurrent=given["concurrent"], queue=given["queue"])
    replica = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": given["threads"]},
        max_ongoing_requests=given["concurrent"] + given["queue"],
        graceful_shutdown_timeout_s=settings.drain_s,
        autoscaling_config={
            "min_replicas": given["min_replicas"],
            "max_replicas": given["max_replicas"],
            "target_ongoing_requests": given["concurrent"] / 2,
        },
    )(Replica)
    front = serve.deployment(name="front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)(Front)
    return front.bind(replica.bind(arguments.get("bundle"), given["threads"], settings), int(settings.body_mb * 1e6))
