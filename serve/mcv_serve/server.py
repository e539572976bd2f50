"""The process: opens the engine while it already answers probes, serves, and goes when it is told to."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mcv_runtime import McvError
from mcv_serve.app import create_app
from mcv_serve.errors import ApiError, dialect_of
from mcv_serve.security import HEALTH
from mcv_serve.service import Service
from mcv_serve.settings import Settings

_LOG = logging.getLogger(__name__)
_HEADER_S = 20.0
"""How long a client may take to say what it wants."""
_CLOSING_S = 5.0


class Starting:
    """Answers 503 until the engine is open, and then what the application answers."""

    def __init__(self, opened: Callable[[], Service], stop: Callable[[], None]) -> None:
        """`opened` opens the engine, in a thread of its own; `stop` ends the server if that fails."""
        self.service: Service | None = None
        self.failed: BaseException | None = None
        self._opened, self._stop = opened, stop
        self._app: ASGIApp | None = None
        self._opening: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            path = scope["path"]
            if path in HEALTH and "ready" not in path and path != "/health":
                await _alive(send)
                return
            refused = ApiError(503, "loading", "the model is being opened; try again soon", retry_after=2.0)
            await refused.response(dialect_of(path))(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._opening = asyncio.create_task(self._open())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._opening.cancel()
        with suppress(asyncio.CancelledError):
            await self._opening
        if self._saving is not None:
            self._saving.cancel()
        if self.service is not None:
            self.service.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self.service = await loop.run_in_executor(ThreadPoolExecutor(1, "mcv-open"), self._opened)
        except Exception as error:
            self.failed = error
            self._stop()
            return
        loop.set_default_executor(self.service.stepping)
        if self.service.settings.state is not None:
            self._saving = loop.create_task(self.service.save_state_when_idle())
        self._app = create_app(self.service)
        _LOG.info("%s is ready", self.service.model)


async def _alive(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"status":"loading"}'})


class Server(uvicorn.Server):
    """Uvicorn's, which ends with 0 after SIGTERM or SIGINT, and lets what runs finish for a while."""

    def __init__(self, settings: Settings, opened: Callable[[], Service], *, host: str, port: int, **more: Any) -> None:
        self.starting = Starting(opened, self._give_up)
        self._settings = settings
        config = uvicorn.Config(
            self.starting,
            host=host,
            port=port,
            http=_Impatient,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(settings.drain_s + 2 * _CLOSING_S),
            **more,
        )
        super().__init__(config)

    def _give_up(self) -> None:
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but a signal that was obeyed is not raised once more at the end."""
        loop, caught = asyncio.get_running_loop(), []
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or Windows
                loop.add_signal_handler(number, self.handle_exit, number, None)
                caught.append(number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    async def shutdown(self, sockets: Any = None) -> None:
        """Take nobody any more, let what runs finish, and end the rest."""
        service = self.starting.service
        drained = None if service is None else asyncio.create_task(self._drain(service))
        await super().shutdown(sockets)
        if drained is not None:
            await drained

    async def _drain(self, service: Service) -> None:
        if not await service.drain(self._settings.drain_s):
            _LOG.warning("some requests did not finish within %s s and were ended", self._settings.drain_s)


class _Impatient(H11Protocol):
    """Closes a connection whose client does not say what it wants."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asked():
            self._rest()
        elif self._patience is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._patience = self.loop.call_later(_HEADER_S, self._too_slow)

    def _rest(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_slow(self) -> None:
        self._patience = None
        if not self._asked() and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


def serve(server: Server) -> None:
    """Until it is told to go; raises what kept the engine from opening."""
    server.run()
    if isinstance(server.starting.failed, McvError):
        raise server.starting.failed
    if server.starting.failed is not None:
        raise RuntimeError("the engine could not be opened") from server.starting.failed
