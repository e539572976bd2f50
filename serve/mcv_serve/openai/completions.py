"""/v1/completions: texts that are gone on with, without a chat template."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mcv_runtime import Answer, Completion, Engine, Piece
from mcv_serve import body as bodies
from mcv_serve import told
from mcv_serve.answering import Answering
from mcv_serve.asked import Asked
from mcv_serve.errors import ApiError
from mcv_serve.openai.asking import completion_asked
from mcv_serve.openai.chat import fingerprint
from mcv_serve.openai.schema import CompletionBody
from mcv_serve.replying import Lines, streamed, whole
from mcv_serve.service import Service

_MOST_PROMPTS = 128


def router(service: Service) -> APIRouter:
    """Its routes."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/completions", openapi_extra=bodies.described(CompletionBody, stream="text/event-stream"))
    async def complete(request: Request) -> Response:
        body, key = await bodies.parsed(await bodies.read(request, service.settings), CompletionBody, service)
        info = service.engine.info()
        every = [completion_asked(body, prompt, info, service.settings) for prompt in prompts_of(body, service.engine)]
        if body.stream:
            if len(every) > 1:
                raise ApiError(
                    400, "invalid_value", "a stream answers one prompt; send the others by themselves", param="prompt"
                )
            writer = _Writer(service, every[0], with_usage=bool(body.stream_options and body.stream_options.include_usage))
            return await streamed(service, every[0], request, key, writer.write, "openai")
        if len(every) == 1:
            answers = [await whole(service, every[0], request, key)]
        else:
            answers = await _together(service, every, request, key)
        return JSONResponse(_completion(service, every, answers))

    return routes


async def _together(service: Service, every: list[Asked], request: Request, key: str) -> list[tuple[Answering, Answer]]:
    tasks = [asyncio.ensure_future(whole(service, asked, request, f"{key} {at}")) for at, asked in enumerate(every)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def prompts_of(body: CompletionBody, engine: Engine) -> list[str]:
    """The texts of a body; ids are taken where the tokenizer makes the same ones of their text."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if all(isinstance(item, str) for item in body.prompt):
        texts = [item for item in body.prompt if isinstance(item, str)]
        if len(texts) > _MOST_PROMPTS:
            raise ApiError(400, "invalid_value", f"a request may have {_MOST_PROMPTS} prompts", param="prompt")
        return texts
    ids = [item for item in body.prompt if isinstance(item, int)]
    if len(ids) < len(body.prompt):
        raise ApiError(400, "invalid_value", "a prompt is a text, a list of texts, or a list of token ids", param="prompt")
    text = engine.detokenize(ids)
    if list(engine.tokenize(text))[-len(ids) :] != ids:
        raise ApiError(400, "invalid_value", "these ids are not those of their own text; send the text", param="prompt")
    return [text]


def _completion(service: Service, every: list[Asked], answers: list[tuple[Answering, Answer]]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    usages = []
    for asked, (_, answer) in zip(every, answers, strict=True):
        several = [answer] * asked.copies if asked.copies > 1 else [answer, *answer.alternatives]
        choices += [_choice(service, len(choices) + index, one) for index, one in enumerate(several)]
        usages.append(told.usage(answer, asked.copies))
    totals = {name: sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    details = [usage["prompt_tokens_details"] for usage in usages]
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(answers[0][0].created),
        "model": service.model,
        "choices": choices,
        "usage": {**totals, "prompt_tokens_details": {name: sum(one[name] for one in details) for name in details[0]}},
        "system_fingerprint": fingerprint(service),
        "timings": told.timings(answers[0][1]),
    }


def _choice(service: Service, index: int, one: Completion) -> dict[str, Any]:
    reason, details = told.ending(one)
    choice: dict[str, Any] = {"index": index, "text": one.text, "logprobs": None, "finish_reason": reason}
    if one.logprobs is not None:
        choice["logprobs"] = _logprobs(service.engine, one)
    if details:
        choice["finish_details"] = details
    return choice


def _logprobs(engine: Engine, one: Any) -> dict[str, Any]:
    """In the older form: lists beside each other."""
    every = told.token_logprobs(engine, one)
    offsets, place = [], 0
    for token in every:
        offsets.append(place)
        place += len(token["token"])
    return {
        "tokens": [token["token"] for token in every],
        "token_logprobs": [token["logprob"] for token in every],
        "top_logprobs": [{other["token"]: other["logprob"] for other in token["top_logprobs"]} for token in every],
        "text_offset": offsets,
    }


class _Writer:
    """Writes a completion as chunks; the first of several as it is made, the others whole."""

    def __init__(self, service: Service, asked: Asked, *, with_usage: bool) -> None:
        self._service, self._asked, self._with_usage = service, asked, with_usage

    async def write(self, answering: Answering, pieces: AsyncIterator[Piece | str | None]) -> Lines:
        """Chunks, and None for a silence."""
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(answering.created),
            "model": self._service.model,
        }
        usage = {"usage": None} if self._with_usage else {}
        async for piece in pieces:
            if piece is None:
                yield None
                continue
            told_of = _logprobs(self._service.engine, piece) if isinstance(piece, Piece) and piece.logprobs else None
            choice = {"index": 0, "text": piece, "logprobs": told_of, "finish_reason": None}
            yield {**head, "choices": [choice], **usage}
        answer = await answering.finished()
        others = [answer] * (self._asked.copies - 1) if self._asked.copies > 1 else list(answer.alternatives)
        for index, other in enumerate(others, 1):
            yield {**head, "choices": [_choice(self._service, index, other)], **usage}
        last = {**_choice(self._service, 0, answer), "text": "", "logprobs": None}
        yield {**head, "choices": [last], **usage, "timings": told.timings(answer)}
        if self._with_usage:
            yield {**head, "choices": [], "usage": told.usage(answer, self._asked.copies)}
