"""Ollama's routes: questions, and what there is to ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mcv_runtime import Answer, Piece
from mcv_runtime.files import parse_json
from mcv_serve import body as bodies
from mcv_serve import told
from mcv_serve.answering import Answering
from mcv_serve.asked import Asked
from mcv_serve.errors import ApiError
from mcv_serve.ollama.asking import chat_asked, generate_asked
from mcv_serve.ollama.schema import OllamaChatBody, OllamaGenerateBody, OllamaShowBody
from mcv_serve.replying import Lines, streamed, whole
from mcv_serve.service import Service
from mcv_serve.state_routes import server_version
from mcv_serve.tools import Call, read_call

_FOREVER = "2318-01-01T00:00:00Z"
"""The model is never put away."""


def router(service: Service) -> APIRouter:
    """All of them."""
    routes = APIRouter(tags=["ollama"])
    settings = service.settings

    async def answered(asked: Asked, request: Request, key: str, stream: bool | None, *, chat: bool) -> Response:
        writer = _Writer(service, asked, chat=chat)
        if stream is not False:
            return await streamed(service, asked, request, key, writer.write, "ollama")
        _, answer = await whole(service, asked, request, key)
        return JSONResponse(writer.whole(answer))

    @routes.post("/api/chat", openapi_extra=bodies.described(OllamaChatBody, stream="application/x-ndjson"))
    async def chat(request: Request) -> Response:
        body, key = await bodies.parsed(await bodies.read(request, settings), OllamaChatBody, service)
        if not body.messages:
            return JSONResponse({**_head(service), **_said("", chat=True), "done": True, "done_reason": "load"})
        return await answered(chat_asked(body, service.engine.info(), settings), request, key, body.stream, chat=True)

    @routes.post("/api/generate", openapi_extra=bodies.described(OllamaGenerateBody, stream="application/x-ndjson"))
    async def generate(request: Request) -> Response:
        body, key = await bodies.parsed(await bodies.read(request, settings), OllamaGenerateBody, service)
        if not body.prompt:
            if body.images:
                raise ApiError(400, "invalid_value", "images without a prompt", param="prompt")
            return JSONResponse({**_head(service), **_said("", chat=False), "done": True, "done_reason": "load"})
        return await answered(generate_asked(body, service.engine.info(), settings), request, key, body.stream, chat=False)

    @routes.get("/api/version")
    async def version() -> dict[str, str]:
        return {"version": server_version()}

    @routes.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [_model(service)]}

    @routes.get("/api/ps")
    async def loaded() -> dict[str, Any]:
        context = service.engine.info().context_length
        return {"models": [{**_model(service), "expires_at": _FOREVER, "size_vram": 0, "context_length": context}]}

    @routes.post("/api/show", openapi_extra=bodies.described(OllamaShowBody))
    async def show(request: Request) -> dict[str, Any]:
        await bodies.parsed(await bodies.read(request, settings), OllamaShowBody, service)
        info, manifest = service.engine.info(), service.engine.bundle.manifest
        capabilities = ["completion", "vision", "tools", *(["thinking"] if info.thinking else [])]
        return {
            "modelfile": f"# {service.model}, served by mcv-serve",
            "parameters": f"temperature {settings.temperature}",
            "template": service.engine.bundle.read_text(manifest.text.chat_template),
            "details": _details(service),
            "model_info": {
                "general.architecture": info.family,
                "general.basename": service.model,
                f"{info.family}.context_length": info.context_length,
                f"{info.family}.embedding_length": manifest.hidden_size,
                f"{info.family}.vocab_size": info.vocab_size,
            },
            "capabilities": capabilities,
            "modified_at": _time(service.started),
        }

    return routes


def _details(service: Service) -> dict[str, Any]:
    info = service.engine.info()
    return {
        "parent_model": "",
        "format": "onnx",
        "family": info.family,
        "families": [info.family],
        "parameter_size": "",
        "quantization_level": info.precisions["decoder_with_past"],
    }


def _model(service: Service) -> dict[str, Any]:
    bundle = service.engine.bundle
    return {
        "name": service.model,
        "model": service.model,
        "modified_at": _time(service.started),
        "size": sum(file.size for file in bundle.manifest.files.values()),
        "digest": bundle.identity,
        "details": _details(service),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _head(service: Service) -> dict[str, Any]:
    return {"model": service.model, "created_at": _time(datetime.now(UTC).timestamp())}


def _said(text: str, *, chat: bool) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if chat else {"response": text}


class _Writer:
    """Writes one answer, whole or line by line; as a message, or as text alone."""

    def __init__(self, service: Service, asked: Asked, *, chat: bool) -> None:
        self._service, self._asked, self._chat = service, asked, chat

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer."""
        said = told.told(answer, self._asked)
        value = {**_head(self._service), **self._part(said.content, said.reasoning, said.calls)}
        if answer.logprobs is not None:
            value["logprobs"] = told.token_logprobs(self._service.engine, answer)
        return {**value, **_end(answer)}

    async def write(self, answering: Answering, pieces: AsyncIterator[Piece | str | None]) -> Lines:
        """Line by line; in a silence a line that says nothing, as this dialect has no comments."""
        channels = told.channels_of(self._asked)
        async for piece in pieces:
            if piece is None:
                yield {**_head(self._service), **self._part("", ""), "done": False}
                continue
            logprobs = told.token_logprobs(self._service.engine, piece) if isinstance(piece, Piece) and piece.logprobs else None
            for value in self._values(channels.push(piece)):
                if logprobs:
                    value["logprobs"], logprobs = logprobs, None
                yield value
        answer = await answering.finished()
        for value in self._values(channels.finish()):
            yield value
        yield {**_head(self._service), **self._part("", ""), **_end(answer)}

    def _values(self, parts: Any) -> list[dict[str, Any]]:
        values = []
        for part in parts:
            call = read_call(part.text, self._asked.tools) if part.channel == "call" else None
            if call is not None:
                value = self._part("", "", (call,))
            elif part.channel == "reasoning":
                value = self._part("", part.text)
            else:
                value = self._part(part.text if part.channel == "content" else told.uncalled(part.text), "")
            values.append({**_head(self._service), **value, "done": False})
        return values

    def _part(self, content: str, reasoning: str, calls: tuple[Call, ...] = ()) -> dict[str, Any]:
        said = _said(content, chat=self._chat)
        place = said["message"] if self._chat else said
        if reasoning:
            place["thinking"] = reasoning
        if calls:
            place["tool_calls"] = [
                {"function": {"name": call.name, "arguments": parse_json(call.arguments, "a call", error=ValueError)}}
                for call in calls
            ]
        return said


def _end(answer: Answer) -> dict[str, Any]:
    times = answer.timings
    took = {"load_duration": 0.0, "prompt_eval_duration": times.vision + times.prefill, "eval_duration": times.decode}
    took["total_duration"] = times.preprocess + times.vision + times.prefill + times.decode
    reason, details = told.ending(answer)
    return {
        "done": True,
        "done_reason": reason,
        **({"done_details": details} if details else {}),
        "prompt_eval_count": len(answer.prompt_tokens),
        "prompt_cached_count": answer.reused_tokens,
        "image_tokens": told.visual_tokens(answer),
        "eval_count": len(answer.tokens),
        **{name: int(seconds * 1e9) for name, seconds in took.items()},
    }
