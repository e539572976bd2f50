"""/v1/responses, without a memory: what was said before comes with the request."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from mcv_runtime import Answer, Piece
from mcv_serve import body as bodies
from mcv_serve import told
from mcv_serve.answering import Answering
from mcv_serve.asked import Asked
from mcv_serve.errors import ApiError
from mcv_serve.openai.asking import chat_asked
from mcv_serve.openai.responses_schema import InputCall, InputMessage, InputResult, NamedChoice, ResponsesBody
from mcv_serve.openai.schema import (
    ChatBody,
    Function,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
)
from mcv_serve.replying import Lines, streamed, whole
from mcv_serve.service import Service
from mcv_serve.tools import Call, read_call


def router(service: Service) -> APIRouter:
    """Its routes."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/responses", openapi_extra=bodies.described(ResponsesBody, stream="text/event-stream"))
    async def respond(request: Request) -> Response:
        body, key = await bodies.parsed(await bodies.read(request, service.settings), ResponsesBody, service)
        try:
            said = as_chat(body)
        except ValidationError as error:  # a chat is checked more closely
            raise bodies.refusal(error, {}) from None
        asked = chat_asked(said, service.engine.info(), service.settings, kind="responses")
        if body.stream:
            return await streamed(service, asked, request, key, _Writer(service, asked, body).write, "openai")
        answering, answer = await whole(service, asked, request, key)
        return JSONResponse(_response(service, body, answering, _items(asked, answer), answer))

    return routes


def as_chat(body: ResponsesBody) -> ChatBody:
    """The same request as a chat."""
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        messages.append(Message(role="user", content=body.input))
    for item in () if isinstance(body.input, str) else body.input:
        if isinstance(item, InputMessage):
            messages.append(Message(role=item.role, content=item.content))
        elif isinstance(item, InputCall):
            call = ToolCall.model_validate({"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}})
            if messages and messages[-1].role == "assistant":
                messages[-1] = messages[-1].model_copy(update={"tool_calls": [*(messages[-1].tool_calls or ()), call]})
            else:
                messages.append(Message(role="assistant", tool_calls=[call]))
        elif isinstance(item, InputResult):
            messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
    if not messages:
        raise ApiError(400, "invalid_value", "input has no message", param="input")
    form = body.text.format if body.text is not None else None
    choice: Any = body.tool_choice
    if isinstance(choice, NamedChoice):
        choice = NamedTool(function=NamedFunction(name=choice.name))
    tools = [Tool(function=Function(name=t.name, description=t.description, parameters=t.parameters)) for t in body.tools or ()]
    copied = (
        "temperature", "top_p", "max_slice_nums", "downsample_mode", "use_image_id", "max_num_frames", "stack_frames",
    )  # fmt: skip
    return ChatBody(
        messages=messages,
        max_tokens=body.max_output_tokens,
        tools=tools or None,
        tool_choice=choice,
        response_format=None if form is None else ResponseFormat.model_validate({"type": form.type, "schema": form.schema_}),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        logprobs=True if body.top_logprobs else None,
        top_logprobs=body.top_logprobs,
        **{name: getattr(body, name) for name in copied},
    )


def _items(asked: Asked, answer: Answer) -> list[dict[str, Any]]:
    """What the answer is made of."""
    said = told.told(answer, asked)
    items: list[dict[str, Any]] = []
    if said.reasoning:
        items.append(_reasoning(said.reasoning))
    if said.content or not said.calls:
        items.append(_message(said.content, status="completed" if answer.stop_reason == "stop" else "incomplete"))
    return items + [_call(call) for call in said.calls]


def _reasoning(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def _message(text: str, *, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text(text)],
    }


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "call_id": f"call_{secrets.token_hex(12)}",
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _response(
    service: Service, body: ResponsesBody, answering: Answering, items: list[dict[str, Any]], answer: Answer | None
) -> dict[str, Any]:
    ended = answer is None or answer.stop_reason == "stop"
    status = "in_progress" if answer is None else "completed" if ended else "incomplete"
    reason = None if answer is None or ended else "max_output_tokens" if answer.stop_reason == "length" else answer.stop_reason
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(answering.created),
        "completed_at": None if answer is None else int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": None if reason is None else {"reason": reason},
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": service.model,
        "output": items,
        "parallel_tool_calls": bool(body.parallel_tool_calls),
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_p": body.top_p,
        "truncation": "disabled",
        "metadata": body.metadata or {},
        "usage": None if answer is None else _usage(answer),
    }


def _plain(choice: Any) -> Any:
    return choice if isinstance(choice, str) else choice.model_dump()


def _usage(answer: Answer) -> dict[str, Any]:
    usage = told.usage(answer)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


class _Writer:
    """Writes one answer as named events."""

    def __init__(self, service: Service, asked: Asked, body: ResponsesBody) -> None:
        self._service, self._asked, self._body = service, asked, body
        self._number = -1
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        """The message or the thoughts that are being written."""

    def _event(self, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
        self._number += 1
        return kind, {"type": kind, "sequence_number": self._number, **more}

    async def write(self, answering: Answering, pieces: AsyncIterator[Piece | str | None]) -> Lines:
        """Events, and None for a silence."""
        begun = _response(self._service, self._body, answering, [], None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        channels = told.channels_of(self._asked)
        parts: list[Any] = []
        async for piece in pieces:
            if piece is None:
                yield None
                continue
            found = channels.push(piece)
            parts += found
            for event in self._parts(found):
                yield event
        answer = await answering.finished()
        found = channels.finish()
        parts += found
        for event in self._parts(found):
            yield event
        if self._asked.forced is not None:
            said = told.told_of(parts, answer, self._asked)
            for event in self._calls(said.calls):
                yield event
            if said.content:
                for event in self._say("message", said.content):
                    yield event
        for event in self._close():
            yield event
        if not self._items:
            for event in (*self._say("message", ""), *self._close()):
                yield event
        whole = {**_response(self._service, self._body, answering, self._items, answer), "id": begun["id"]}
        yield self._event("response.completed" if whole["status"] == "completed" else "response.incomplete", response=whole)

    def _parts(self, parts: list[Any]) -> list[Any]:
        events: list[Any] = []
        for part in parts:
            if part.channel == "reasoning":
                events += self._say("reasoning", part.text)
            elif part.channel == "call" and (call := read_call(part.text, self._asked.tools)) is not None:
                events += [*self._close(), *self._calls((call,))]
            elif self._asked.forced is None:
                events += self._say("message", part.text if part.channel == "content" else told.uncalled(part.text))
        return events

    def _say(self, kind: str, text: str) -> list[Any]:
        events: list[Any] = []
        if self._open is None or self._open["type"] != kind:
            events += self._close()
            self._open = _message("", status="in_progress") if kind == "message" else _reasoning("")
            at = {"output_index": len(self._items)}
            events.append(self._event("response.output_item.added", **at, item={**self._open, "content": []}))
            if kind == "message":
                place = {**at, "item_id": self._open["id"], "content_index": 0}
                events.append(self._event("response.content_part.added", **place, part=_text("")))
        self._open["content"][0]["text"] += text
        if text:
            more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            name = "output_text" if kind == "message" else "reasoning_text"
            events.append(self._event(f"response.{name}.delta", **self._place(), delta=text, **more))
        return events

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items), "content_index": 0}

    def _close(self) -> list[Any]:
        if self._open is None:
            return []
        item, place = self._open, self._place()
        item["status"] = "completed"
        text = item["content"][0]["text"]
        if item["type"] == "message":
            events = [
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_text(text)),
            ]
        else:
            events = [self._event("response.reasoning_text.done", **place, text=text)]
        events.append(self._event("response.output_item.done", output_index=len(self._items), item=item))
        self._items.append(item)
        self._open = None
        return events

    def _calls(self, calls: Any) -> list[Any]:
        events: list[Any] = []
        for call in calls:
            item, at = _call(call), len(self._items)
            place = {"item_id": item["id"], "output_index": at}
            begun = {**item, "arguments": "", "status": "in_progress"}
            events += [
                self._event("response.output_item.added", output_index=at, item=begun),
                self._event("response.function_call_arguments.delta", **place, delta=call.arguments),
                self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments),
                self._event("response.output_item.done", output_index=at, item=item),
            ]
            self._items.append(item)
        return events
