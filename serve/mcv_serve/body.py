"""A request's body: read within its limits, parsed, and checked; what is wrong names its field."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect

from mcv_runtime.errors import shown
from mcv_runtime.files import parse_json
from mcv_serve.errors import ApiError
from mcv_serve.service import Service
from mcv_serve.settings import Settings

_INLINE = 1 << 16
"""Bytes of a body that is parsed at once; a larger one is parsed in a thread."""
_UNSAID = frozenset({"stream", "stream_options", "user", "metadata", "store", "safety_identifier", "prompt_cache_key"})
"""What makes no difference to an answer."""


class Body(BaseModel):
    """Of a request. A field that is not declared is refused by its name."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


Kind = TypeVar("Kind", bound=Body)


async def read(request: Request, settings: Settings) -> bytes:
    """All of a body, which may be so large and take so long."""
    most = int(settings.body_mb * 1e6)
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise _too_large(settings)
    data = bytearray()
    try:
        async with asyncio.timeout(settings.body_s):
            async for piece in request.stream():
                data += piece
                if len(data) > most:
                    raise _too_large(settings)
    except TimeoutError:
        raise ApiError(408, "request_timeout", f"the request's body took longer than {settings.body_s:,.0f} s") from None
    except ClientDisconnect:
        raise ApiError(499, "client_gone", "the client is gone") from None
    return bytes(data)


def _too_large(settings: Settings) -> ApiError:
    return ApiError(413, "body_too_large", f"the request's body has more than {settings.body_mb:,.0f} MB")


async def parsed(data: bytes, kind: type[Kind], service: Service) -> tuple[Kind, str]:
    """A body of that kind, and a key that is the same for bodies that ask the same; the content type is not asked for."""
    if len(data) <= _INLINE:
        return _parsed(data, kind)
    return await service.in_pool(_parsed, data, kind)


def _parsed(data: bytes, kind: type[Kind]) -> tuple[Kind, str]:
    value = parse_json(data, "the request's body", error=_not_json, max_bytes=len(data))
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", "the request's body must be a JSON object")
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise refusal(error, value) from None
    said = json.dumps({name: item for name, item in value.items() if name not in _UNSAID}, sort_keys=True)
    return body, hashlib.sha256(f"{kind.__qualname__} {said}".encode()).hexdigest()


def _not_json(message: str) -> ApiError:
    return ApiError(400, "invalid_json", message)


def refusal(error: ValidationError, body: Any) -> ApiError:
    """One line about what is most to the point: of a field that may be several things, what fits best so far."""
    worst = max(error.errors(include_url=False, include_context=False, include_input=False), key=lambda one: len(one["loc"]))
    field = _field(worst["loc"], body)
    if worst["type"] == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"this server knows no field {shown(field)}; leave it out", param=field)
    message = worst["msg"][:1].lower() + worst["msg"][1:]
    return ApiError(400, "invalid_value", f"{field}: {message}" if field else message, param=field or None)


def _field(way: Sequence[int | str], body: Any) -> str:
    """Where a mistake is, without the steps of the way that stand for the kinds which a field may have."""
    names: list[str] = []
    here = body
    for at, step in enumerate(way):
        inside = dict(enumerate(here)) if isinstance(here, list) else here if isinstance(here, dict) else None
        missing = inside is not None and at + 1 == len(way)  # a field that should be there
        if inside is not None and (step in inside or missing):
            names.append(str(step))
            here = inside.get(step)
    return ".".join(names)


def described(kind: type[BaseModel], *, stream: str | None = None) -> dict[str, Any]:
    """A body for the description of a route in OpenAPI; its schema stands there under the kind's name.

    `stream`: the content type of answers that come as they are made.
    """
    streams: dict[str, Any] = {} if stream is None else {"responses": {"200": {"content": {stream: {"schema": {}}}}}}
    return {
        **streams,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}},
        },
    }
