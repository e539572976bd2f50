"""Servers with the demo model, and clients of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tiny_server import Running

from mcv_runtime import Engine, load
from mcv_serve.settings import Settings


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with load(threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def serving(engine: Engine) -> Iterator[Callable[..., contextlib.AbstractContextManager[Running]]]:
    """`with serving(queue=3) as running`: a server of the demo model with those settings."""

    @contextlib.contextmanager
    def serve(**settings: Any) -> Iterator[Running]:
        running = Running(engine, Settings(**settings))
        running.start()
        try:
            yield running
        finally:
            running.stop()

    yield serve


@pytest.fixture(scope="session")
def running(serving: Callable[..., contextlib.AbstractContextManager[Running]]) -> Iterator[Running]:
    """A server with the usual settings."""
    with serving(keep_alive_s=3600.0) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with running.client() as client:
        yield client
