"""From a body in OpenAI's words to what is asked of the service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcv_runtime import EngineInfo, McvError
from mcv_runtime.files import parse_json
from mcv_serve.asked import Asked, FrameUrls, PictureUrl, Turn, Visual
from mcv_serve.errors import ApiError
from mcv_serve.openai.schema import ChatBody, CompletionBody, ImagePart, Message, Part, Sampling, TextPart, Tool, VideoPart
from mcv_serve.settings import Settings
from mcv_serve.tools import ANY, in_words, schema_of

_LOW_SLICES = 1
"""Of a picture with `detail` low: the overview alone."""
_COPIED = (
    "max_slice_nums", "downsample_mode", "use_image_id", "max_num_frames", "stack_frames", "stop", "stop_token_ids",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


def chat_asked(body: ChatBody, info: EngineInfo, settings: Settings, *, kind: str = "chat") -> Asked:
    """A chat; raises `ApiError` for what makes no sense or cannot be done."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "invalid_value", "two tools have the same name", param="tools")
    forced = _forced(body, tools)
    if body.tool_choice == "none":
        tools = []
    turns = [turn_of(message, f"messages.{at}") for at, message in enumerate(body.messages)]
    options = sampling_options(body, settings, details(body.messages))
    tokens = body.max_completion_tokens or body.max_tokens
    if tokens is not None:
        options["max_new_tokens"] = tokens
    if body.logprobs:
        options["logprobs"] = True
        if body.top_logprobs:
            options["top_logprobs"] = body.top_logprobs
    elif body.top_logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs", param="top_logprobs")
    guided = guide(body)
    if forced is not None:
        if guided:
            raise ApiError(400, "invalid_value", "tool_choice and a form of the answer exclude each other", param="tool_choice")
        guided = {"json_schema": schema_of(tools, forced)}
    options |= guided
    thinking = _thinking(body, info)
    if thinking and guided:
        if body.enable_thinking or (body.chat_template_kwargs is not None and body.chat_template_kwargs.enable_thinking):
            raise ApiError(
                400, "invalid_value", "an answer of a given form is not thought about first; leave enable_thinking out",
                param="chat_template_kwargs.enable_thinking",
            )  # fmt: skip
        thinking = False
    if thinking:
        options["thinking"] = True
    return asked_of(turns, options, info, kind=kind, tools=tools, forced=forced, copies=copies(body, options, settings))


def asked_of(
    turns: Sequence[Turn],
    options: dict[str, Any],
    info: EngineInfo,
    *,
    kind: str,
    tools: Sequence[dict[str, Any]] = (),
    forced: str | None = None,
    copies: int = 1,
) -> Asked:
    """In the words of the checkpoint's template, where it knows tools, and in ours where it does not."""
    if any(token not in range(info.vocab_size) for token in options.get("logit_bias", ())):
        raise ApiError(400, "invalid_value", f"logit_bias names ids below {info.vocab_size:,}", param="logit_bias")
    written = tuple(turns) if info.tools else in_words(turns, tools)
    return Asked(
        turns=written,
        options={**options, "tools": tuple(tools)} if tools and info.tools else options,
        kind=kind,
        tools=tuple(tools),
        forced=forced,
        copies=copies,
    )


def sampling_options(body: Sampling, settings: Settings, slices: int | None = None) -> dict[str, Any]:
    """The runtime's options of what all bodies share; `slices`: of a body that names no budget itself."""
    options = {name: value for name in _COPIED if (value := getattr(body, name)) is not None}
    if slices is not None:
        options.setdefault("max_slice_nums", slices)
    if options.get("stop") in ("", []):
        del options["stop"]
    temperature = body.temperature
    if temperature is None:
        temperature = settings.temperature or (1.0 if (body.n or 1) > 1 else 0.0)
    seed = None if body.seed is None else body.seed % 2**64
    options |= drawing_options(temperature, body.top_k, body.top_p, body.min_p, seed)
    if body.logit_bias:
        options["logit_bias"] = {_token_id(name): value for name, value in body.logit_bias.items()}
    guard = settings.repeat_guard if body.repeat_guard is None else body.repeat_guard
    if guard:
        options["repeat_guard"] = guard
    return options


def drawing_options(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
) -> dict[str, Any]:
    """Options that count where tokens are drawn; none without a temperature. A `top_k` below 1 is none."""
    if temperature <= 0:
        return {}
    options: dict[str, Any] = {"temperature": temperature}
    if top_k is not None and top_k > 0:
        options["top_k"] = top_k
    if top_p is not None:
        options["top_p"] = max(top_p, 1e-9)
    if min_p is not None:
        options["min_p"] = min_p
    if seed is not None:
        options["seed"] = seed
    return options


def copies(body: Sampling, options: dict[str, Any], settings: Settings) -> int:
    """`n`: drawn answers side by side, or so many times the one that there is."""
    n = body.n or 1
    if n > settings.answers:
        raise ApiError(400, "invalid_value", f"n may be {settings.answers}, not {n}", param="n")
    if n > 1 and "temperature" in options:
        options["num_return_sequences"] = n
        return 1
    return n


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdigit()) or len(name) > 9:
        raise ApiError(400, "invalid_value", "logit_bias gives numbers by token id", param="logit_bias")
    return int(name)


def guide(body: Sampling) -> dict[str, Any]:
    """The option that gives an answer its form, if one is wanted."""
    found: list[tuple[str, Any]] = []
    form, outputs = body.response_format, body.structured_outputs
    if form is not None and form.type == "json_object":
        found.append(("json_schema", form.schema_ or {"type": "object"}))
    if form is not None and form.type == "json_schema":
        schema = form.schema_ if form.json_schema is None else form.json_schema.schema_
        if schema is None:
            raise ApiError(400, "invalid_value", "response_format lacks its schema", param="response_format.json_schema.schema")
        found.append(("json_schema", schema))
    if outputs is not None:
        found += [
            (name, value)
            for name, value in (("json_schema", outputs.json_), ("regex", outputs.regex), ("choices", outputs.choice))
            if value is not None
        ]
        if outputs.json_object:
            found.append(("json_schema", {"type": "object"}))
    guided = (("json_schema", body.guided_json), ("regex", body.guided_regex), ("choices", body.guided_choice))
    found += [(name, value) for name, value in guided if value is not None]
    if len(found) > 1:
        raise ApiError(400, "invalid_value", "an answer can have one form; leave the others out", param="response_format")
    return dict(found)


def _forced(body: ChatBody, tools: Sequence[dict[str, Any]]) -> str | None:
    choice = body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    if not tools:
        raise ApiError(400, "invalid_value", "tool_choice needs tools", param="tool_choice")
    return ANY if isinstance(choice, str) else choice.function.name


def _thinking(body: ChatBody, info: EngineInfo) -> bool:
    asked = body.enable_thinking if body.chat_template_kwargs is None else body.chat_template_kwargs.enable_thinking
    if asked is None and body.reasoning_effort is not None:
        return info.thinking and body.reasoning_effort not in ("none", "minimal")
    return bool(asked)


def details(messages: Sequence[Message]) -> int | None:
    """The slice budget that `detail` of the pictures asks for: one for all, that of the one that wants most."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    wanted = [_detail(part) for part in parts if isinstance(part, ImagePart)]
    return _LOW_SLICES if wanted and all(detail == "low" for detail in wanted) else None


def _detail(part: ImagePart) -> str | None:
    return part.detail if isinstance(part.image_url, str) else part.image_url.detail or part.detail


def turn_of(message: Message, where: str) -> Turn:
    """One message; `where` it stands in the body."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    content = message.content
    if message.tool_calls and role != "assistant":
        raise ApiError(400, "invalid_value", "tool_calls belong to the assistant", param=f"{where}.tool_calls")
    calls = tuple(
        {"name": call.function.name, "arguments": _arguments(call.function.arguments, f"{where}.tool_calls.{at}")}
        for at, call in enumerate(message.tool_calls or ())
    )
    if content is None and not calls:
        raise ApiError(400, "invalid_value", "a message has no content", param=f"{where}.content")
    if isinstance(content, str) or content is None:
        return Turn(role, (content,) if content else ("",), calls)
    return Turn(role, tuple(part_of(part, f"{where}.content.{at}") for at, part in enumerate(content)) or ("",), calls)


def part_of(part: Part, where: str) -> str | Visual:
    """One part of a message."""
    if isinstance(part, TextPart):
        return part.text or part.refusal or ""
    if isinstance(part, VideoPart):
        source = part.video_url if part.video_url is not None else part.video
        if source is None:
            raise ApiError(400, "invalid_value", "a video part has no video", param=f"{where}.video_url")
        if isinstance(source, list):
            return FrameUrls(tuple(source), part.fps or 1.0, f"{where}.video")
        return PictureUrl(source if isinstance(source, str) else source.url, is_video=True, param=f"{where}.video_url")
    url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
    return PictureUrl(url, param=f"{where}.image_url")


def _arguments(given: Any, where: str) -> Any:
    """A call's arguments, which are JSON text, as a mapping."""
    if not isinstance(given, str):
        return given

    def refusal(message: str) -> McvError | ApiError:
        return ApiError(400, "invalid_value", message, param=f"{where}.function.arguments")

    value = parse_json(given or "{}", "the arguments of a call", error=refusal)
    if not isinstance(value, dict):
        raise refusal("the arguments of a call are no JSON object")
    return value


def completion_asked(body: CompletionBody, prompt: str, info: EngineInfo, settings: Settings) -> Asked:
    """A text that is gone on with as it is."""
    options = sampling_options(body, settings)
    options |= guide(body)
    options["raw"] = True
    options["max_new_tokens"] = body.max_tokens or 16
    if body.logprobs is not None:
        options["logprobs"] = True
        if body.logprobs:
            options["top_logprobs"] = body.logprobs
    pictures = tuple(PictureUrl(url, param=f"images.{at}") for at, url in enumerate(body.images or ()))
    turn = Turn("user", (*pictures, prompt))
    return asked_of([turn], options, info, kind="completions", copies=copies(body, options, settings))


def tools_of(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """As the chat template takes them."""
    return [tool.model_dump(exclude_none=True) for tool in tools or ()]
