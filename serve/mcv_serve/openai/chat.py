"""/v1/chat/completions: whole answers and streams of them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mcv_runtime import Answer, Completion, Piece
from mcv_serve import body as bodies
from mcv_serve import told
from mcv_serve.answering import Answering
from mcv_serve.asked import Asked
from mcv_serve.openai.asking import chat_asked
from mcv_serve.openai.schema import ChatBody
from mcv_serve.replying import Lines, streamed, whole
from mcv_serve.service import Service
from mcv_serve.tools import ANY, Call, read_call

Choice = dict[str, Any]


def router(service: Service) -> APIRouter:
    """Its routes."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=bodies.described(ChatBody, stream="text/event-stream"), tags=["openai"])
    @routes.post("/chat/completions", include_in_schema=False)
    async def chat(request: Request) -> Response:
        body, key = await bodies.parsed(await bodies.read(request, service.settings), ChatBody, service)
        asked = chat_asked(body, service.engine.info(), service.settings)
        if body.stream:
            writer = ChatStream(service, asked, with_usage=bool(body.stream_options and body.stream_options.include_usage))
            return await streamed(service, asked, request, key, writer.write, "openai")
        answering, answer = await whole(service, asked, request, key)
        return JSONResponse(completion(service, asked, answering, answer))

    return routes


def completion(service: Service, asked: Asked, answering: Answering, answer: Answer) -> dict[str, Any]:
    """A whole answer."""
    every = [answer] * asked.copies if asked.copies > 1 else [answer, *answer.alternatives]
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(answering.created),
        "model": service.model,
        "choices": [_choice(service, asked, index, one) for index, one in enumerate(every)],
        "usage": told.usage(answer, asked.copies),
        "system_fingerprint": fingerprint(service),
        "timings": told.timings(answer),
        "pictures": told.pictures(answer),
    }


def fingerprint(service: Service) -> str:
    """Of what answers: the same for the same bundle."""
    return f"mcv_{service.engine.bundle.identity[:12]}"


def _choice(service: Service, asked: Asked, index: int, one: Completion) -> Choice:
    said = told.told(one, asked)
    message: dict[str, Any] = {"role": "assistant", "content": said.content if said.content or not said.calls else None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = [written(call) for call in said.calls]
    choice: Choice = {"index": index, "message": message, "logprobs": None, "finish_reason": said.finish_reason}
    if one.logprobs is not None:
        choice["logprobs"] = {"content": told.token_logprobs(service.engine, one), "refusal": None}
    if said.details:
        choice["finish_details"] = said.details
    return choice


def written(call: Call, index: int | None = None) -> dict[str, Any]:
    """A call of a function."""
    place = {} if index is None else {"index": index}
    function = {"name": call.name, "arguments": call.arguments}
    return {**place, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class ChatStream:
    """Writes one answer as chunks. The first of several answers comes as it is made, the others whole when it is finished."""

    def __init__(self, service: Service, asked: Asked, *, with_usage: bool) -> None:
        self._service, self._asked, self._with_usage = service, asked, with_usage
        self._channels = told.channels_of(asked)
        self._named = asked.forced if asked.forced != ANY else None
        """The function that is called in any case: its arguments come as they are made."""
        self._held = asked.forced == ANY
        """Whether the text is a call that is known when it is whole."""
        self._parts: list[Any] = []
        self._calls = 0
        self._logprobs_given = 0
        self._head: dict[str, Any] = {}

    async def write(self, answering: Answering, pieces: AsyncIterator[Piece | str | None]) -> Lines:
        """Chunks, and None for a silence."""
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(answering.created),
            "model": self._service.model,
            "system_fingerprint": fingerprint(self._service),
        }
        yield self._chunk(0, {"role": "assistant", "content": None if self._asked.forced else ""})
        if self._named is not None:
            yield self._chunk(0, {"tool_calls": [written(Call(self._named, ""), 0)]})
        async for piece in pieces:
            if piece is None:
                yield None
                continue
            logprobs = self._logprobs(piece)
            for delta in self._deltas(self._channels.push(piece)):
                yield self._chunk(0, delta, logprobs=logprobs)
                logprobs = None
            if logprobs:
                yield self._chunk(0, {"content": ""}, logprobs=logprobs)
        answer = await answering.finished()
        for delta in self._deltas(self._channels.finish()):
            yield self._chunk(0, delta)
        said = told.told_of(self._parts, answer, self._asked)
        if self._held:
            for at, call in enumerate(said.calls):
                yield self._chunk(0, {"tool_calls": [written(call, at)]})
            if not said.calls and said.content:
                yield self._chunk(0, {"content": said.content})
        if answer.logprobs is not None and self._logprobs_given < len(answer.tokens):
            rest = told.token_logprobs(self._service.engine, answer, self._logprobs_given)
            yield self._chunk(0, {"content": ""}, logprobs={"content": rest, "refusal": None})
        others = [answer] * (self._asked.copies - 1) if self._asked.copies > 1 else list(answer.alternatives)
        for index, other in enumerate(others, 1):
            choice = _choice(self._service, self._asked, index, other)
            delta = choice["message"]
            if "tool_calls" in delta:
                delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(delta["tool_calls"])]
            yield self._chunk(index, delta, logprobs=choice["logprobs"])
            yield self._last(index, choice["finish_reason"], choice.get("finish_details"), answer)
        yield self._last(0, said.finish_reason, said.details, answer)
        if self._with_usage:
            yield {**self._head, "choices": [], "usage": told.usage(answer, self._asked.copies)}

    def _deltas(self, parts: list[Any]) -> list[dict[str, Any]]:
        self._parts += parts
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if self._held:
                continue
            if part.channel == "reasoning":
                deltas.append({"reasoning_content": part.text})
            elif self._named is not None:
                deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": part.text}}]})
            elif part.channel == "content":
                deltas.append({"content": part.text})
            elif (call := read_call(part.text, self._asked.tools)) is not None:
                deltas.append({"tool_calls": [written(call, self._calls)]})
                self._calls += 1
            else:
                deltas.append({"content": told.uncalled(part.text)})
        return deltas

    def _logprobs(self, piece: Piece | str) -> dict[str, Any] | None:
        if not isinstance(piece, Piece) or not piece.logprobs:
            return None
        self._logprobs_given += len(piece.tokens)
        return {"content": told.token_logprobs(self._service.engine, piece), "refusal": None}

    def _chunk(self, index: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._whole([choice])

    def _last(self, index: int, reason: str, details: dict[str, str] | None, answer: Answer) -> dict[str, Any]:
        choice: Choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
        if details:
            choice["finish_details"] = details
        return {**self._whole([choice]), "timings": told.timings(answer), "pictures": told.pictures(answer)}

    def _whole(self, choices: list[Choice]) -> dict[str, Any]:
        return {**self._head, "choices": choices, **({"usage": None} if self._with_usage else {})}
