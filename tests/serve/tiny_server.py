"""A server in a thread of the test's own, and what to ask it about the demo picture."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from mcv_runtime import Engine
from mcv_serve.server import Server
from mcv_serve.service import Service
from mcv_serve.settings import Settings

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
QUESTION, ANSWER = "What does the text say?", "HELLO"
"""Of the demo picture, as its card says."""


def data_url(picture: Path | Image.Image | bytes = DEMO, kind: str = "PNG", label: str = "image/png", **save: Any) -> str:
    """A picture as a data: URL; the label need not be true."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **save)
        picture = buffer.getvalue()
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    return f"data:{label};base64,{base64.b64encode(data).decode()}"


def about_demo(question: str = QUESTION, url: str | None = None, **more: Any) -> dict[str, Any]:
    """A chat's body about the demo picture."""
    parts = [{"type": "image_url", "image_url": {"url": url or data_url()}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}], **more}


def text_chat(question: str, **more: Any) -> dict[str, Any]:
    """A chat's body without a picture."""
    return {"messages": [{"role": "user", "content": question}], **more}


class Running:
    """A server that listens, and its service."""

    def __init__(self, engine: Engine | Callable[[], Engine], settings: Settings, *, keep_engine: bool = True) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen()  # before anybody asks whether the server is ready
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

        def opened() -> Service:
            service = Service(engine if isinstance(engine, Engine) else engine(), settings)
            if keep_engine:
                service.close = lambda: _close_but_engine(service)  # type: ignore[method-assign]
            return service

        self.server = Server(settings, opened, host="127.0.0.1", port=0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    @property
    def service(self) -> Service:
        assert self.server.starting.service is not None
        return self.server.starting.service

    def start(self) -> None:
        self.thread.start()
        with self.client() as client:
            while client.get("/ready").status_code != 200:
                pass

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=120, trust_env=False, **more)


def _close_but_engine(service: Service) -> None:
    service._pool.shutdown(wait=True, cancel_futures=True)
    service.stepping.shutdown(wait=True, cancel_futures=True)


def events(response: httpx.Response) -> list[Any]:
    """The values of a stream of server-sent events."""
    found = []
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            found.append(json.loads(line.removeprefix("data: ")))
    return found


class Gate:
    """Lets an engine decode a step only when it is told to: what happens between two tokens is then no matter of time."""

    def __init__(self, engine: Engine) -> None:
        self._decoder = engine._scheduler.decoder
        self._step = self._decoder.step
        self._permits = threading.Semaphore(0)
        self._open = False
        self.steps = 0
        """That were begun."""
        self.reached = threading.Semaphore(0)
        """Released whenever a step waits."""

    def __enter__(self) -> Gate:
        self._decoder.step = self._gated  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._decoder.step = self._step  # type: ignore[method-assign]

    def _gated(self, *given: Any) -> Any:
        self.steps += 1
        self.reached.release()
        if not self._open:
            self._permits.acquire()
        return self._step(*given)

    def let(self, steps: int) -> None:
        """So many more."""
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        """All that come."""
        self._open = True
        self.let(1)


LONG = "ab" * 100


def endless(**more: Any) -> dict[str, Any]:
    """A chat whose answer is long."""
    return text_chat("Hello", guided_regex="(ab){100}", max_tokens=300, **more)
