"""Around every route: keys, headers, and who is let in from other pages."""

from __future__ import annotations

import hashlib
import hmac
import logging
import traceback
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mcv_serve.errors import ApiError, dialect_of

_LOG = logging.getLogger(__name__)
HEALTH = frozenset({"/health", "/healthz", "/ready", "/readyz", "/ping"})
"""What probes ask without a key."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of answers that do not have their own."""


class SecurityHeaders:
    """Adds them to what has none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, guarded if scope["type"] == "http" else send)


class Failures:
    """Answers what nobody foresaw with 500, and says no more about it than its kind: its message may quote the request."""

    def __init__(self, app: ASGIApp, log_content: bool) -> None:
        self._app, self._log_content = app, log_content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            _LOG.error(
                "%s failed: %s at %s:%s", scope.get("path"), type(error).__name__, place.name, place.lineno,
                exc_info=error if self._log_content else None,
            )  # fmt: skip
            if not begun and scope["type"] == "http":
                await ApiError.of(error).response(dialect_of(scope["path"]))(scope, receive, send)


class ApiKeys:
    """Refuses who shows none of the keys, as a bearer's token or `X-Api-Key`; in a time that tells nothing about them."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], free: frozenset[str] = HEALTH) -> None:
        self._app, self._free = app, free
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in self._free and scope["method"] != "OPTIONS":
            headers = Headers(scope=scope)
            kind, _, token = headers.get("authorization", "").partition(" ")
            shown = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
            digest = hashlib.sha256(shown.encode("utf-8", "surrogateescape")).digest()
            known = [hmac.compare_digest(digest, one) for one in self._digests]
            if not any(known):
                refused = ApiError(401, "invalid_api_key", "show one of the server's API keys: Authorization: Bearer KEY")
                await refused.response(dialect_of(scope["path"]))(scope, receive, send)
                return
            state: dict[str, Any] = scope.setdefault("state", {})
            state["key"] = known.index(True) + 1
        await self._app(scope, receive, send)
