"""/v1/models, and what counts and cuts tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from mcv_serve import body as bodies
from mcv_serve import told
from mcv_serve.errors import ApiError
from mcv_serve.openai.asking import asked_of, chat_asked, tools_of, turn_of
from mcv_serve.openai.schema import ChatBody, DetokenizeBody, TokenizeBody
from mcv_serve.service import Service
from mcv_serve.state_routes import modalities


def router(service: Service) -> APIRouter:
    """Its routes."""
    routes = APIRouter(tags=["openai"])
    settings = service.settings

    def described() -> dict[str, Any]:
        info = service.engine.info()
        return {
            "id": service.model,
            "object": "model",
            "created": int(service.started),
            "owned_by": "mcv",
            "root": service.model,
            "parent": None,
            "max_model_len": info.context_length,
            "context_length": info.context_length,
            "architecture": {
                "modality": "text+image->text",
                "input_modalities": modalities(service),
                "output_modalities": ["text"],
            },
            "capabilities": {"vision": True, "thinking": info.thinking, "tools": True, "structured_output": True},
            "aliases": [],
            "meta": {"n_ctx": info.context_length, "n_ctx_train": info.context_length, "n_vocab": info.vocab_size},
        }

    @routes.get("/v1/models")
    @routes.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model:
            raise ApiError(404, "model_not_found", "there is no such model here; see /v1/models", param="model")
        return described()

    @routes.post("/v1/chat/completions/input_tokens", openapi_extra=bodies.described(ChatBody))
    async def input_tokens(request: Request) -> dict[str, Any]:
        body, _ = await bodies.parsed(await bodies.read(request, settings), ChatBody, service)
        asked = chat_asked(body, service.engine.info(), settings)
        service.check(asked)
        prompt = await service.in_pool(service.prepared, asked)
        return {
            "object": "response.input_tokens",
            "input_tokens": len(prompt.ids),
            "image_tokens": len(prompt.visual_positions),
            "pictures": told.cuts(prompt, service.engine.bundle.manifest.placeholder),
        }

    @routes.post("/tokenize", openapi_extra=bodies.described(TokenizeBody))
    async def tokenize(request: Request) -> dict[str, Any]:
        body, _ = await bodies.parsed(await bodies.read(request, settings), TokenizeBody, service)
        info = service.engine.info()
        if sum(given is not None for given in (body.prompt, body.content, body.messages)) != 1:
            raise ApiError(400, "invalid_value", "give one of prompt, content and messages", param="prompt")
        if body.messages is not None:
            turns = [turn_of(message, f"messages.{at}") for at, message in enumerate(body.messages)]
            asked = asked_of(turns, {}, info, kind="tokenize", tools=tools_of(body.tools))
            service.check(asked)
            ids = tuple((await service.in_pool(service.prepared, asked)).ids.tolist())
        else:
            ids = await service.in_pool(service.engine.tokenize, body.prompt if body.prompt is not None else body.content or "")
        counted: dict[str, Any] = {"count": len(ids), "max_model_len": info.context_length, "tokens": list(ids)}
        if body.return_token_strs:
            counted["token_strs"] = [service.engine.detokenize([token]) for token in ids]
        return counted

    @routes.post("/detokenize", openapi_extra=bodies.described(DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, Any]:
        body, _ = await bodies.parsed(await bodies.read(request, settings), DetokenizeBody, service)
        text = await service.in_pool(service.engine.detokenize, body.tokens)
        return {"prompt": text, "content": text}

    return routes
