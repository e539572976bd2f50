"""The application: routes, what surrounds them, and how each kind of failure is told."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from mcv_runtime import McvError
from mcv_serve import page, state_routes, vqa
from mcv_serve.errors import ApiError, dialect_of
from mcv_serve.ollama import routes as ollama
from mcv_serve.ollama.schema import OllamaChatBody, OllamaGenerateBody, OllamaShowBody
from mcv_serve.openai import chat, completions, models, responses
from mcv_serve.openai.responses_schema import ResponsesBody
from mcv_serve.openai.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from mcv_serve.security import HEALTH, ApiKeys, Failures, SecurityHeaders
from mcv_serve.service import Service

_ROUTING = {
    404: ("not_found", "there is no such route; /openapi.json lists them"),
    405: ("method_not_allowed", "this route takes another method; /openapi.json says which"),
}
BODIES = (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    OllamaChatBody,
    OllamaGenerateBody,
    OllamaShowBody,
    ResponsesBody,
    TokenizeBody,
)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}}}
    for status, text in (("4XX", "What was asked cannot be done, and why."), ("5XX", "Not now, and when to ask again."))
}


def create_app(service: Service) -> FastAPI:
    """All routes of one service; its lifespan is its owner's affair."""
    app = FastAPI(title="mcv-serve", version=state_routes.server_version(), docs_url=None, redoc_url=None)
    for room in (state_routes, models, chat, completions, responses, ollama, vqa):
        app.include_router(room.router(service), responses=_REFUSALS)
    app.include_router(page.router())
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]

    async def refuse(request: Request, error: Exception) -> Response:
        refused = _refusal(error)
        service.metrics.note_refused(refused.code)
        return refused.response(dialect_of(request.url.path))

    for kind in (ApiError, HTTPException, McvError):
        app.add_exception_handler(kind, refuse)
    # the last one added is the outermost
    app.add_middleware(Failures, log_content=service.settings.log_content)
    app.add_middleware(ApiKeys, keys=service.settings.api_keys, free=HEALTH | page.paths())
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key"],
        )
    app.add_middleware(SecurityHeaders)
    return app


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, HTTPException):
        code, message = _ROUTING.get(error.status_code, ("invalid_request", str(error.detail)))
        return ApiError(error.status_code, code, message)
    return ApiError.of(error)


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with the bodies that the routes read by themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template="#/components/schemas/{model}")
        schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
