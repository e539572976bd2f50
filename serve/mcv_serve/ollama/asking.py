"""From a body in Ollama's words to what is asked of the service."""

from __future__ import annotations

from typing import Any

from mcv_runtime import EngineInfo
from mcv_serve.asked import Asked, PictureUrl, Turn, Visual
from mcv_serve.errors import ApiError
from mcv_serve.ollama.schema import OllamaChatBody, OllamaGenerateBody, OllamaMessage, OllamaOptions
from mcv_serve.openai.asking import asked_of, drawing_options, tools_of
from mcv_serve.settings import Settings

_MARK = "[img]"
"""Where in a text its next picture belongs."""
_COPIED = {
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_slice_nums": "max_slice_nums",
    "downsample_mode": "downsample_mode",
    "use_image_id": "use_image_id",
}


def chat_asked(body: OllamaChatBody, info: EngineInfo, settings: Settings) -> Asked:
    """A chat; raises `ApiError` for what makes no sense or cannot be done."""
    turns = [_turn(message, at) for at, message in enumerate(body.messages)]
    if body.images:  # one client sends them beside the messages
        asked = [at for at, turn in enumerate(turns) if turn.role == "user"]
        if not asked:
            raise ApiError(400, "invalid_value", "images without a message of the user", param="images")
        last = turns[asked[-1]]
        turns[asked[-1]] = Turn("user", (*_pictures(body.images, "images"), *last.parts), last.tool_calls)
    return asked_of(turns, _options(body, info, settings), info, kind="ollama chat", tools=tools_of(body.tools))


def generate_asked(body: OllamaGenerateBody, info: EngineInfo, settings: Settings) -> Asked:
    """One question, or with `raw` a text that is gone on with."""
    options = _options(body, info, settings)
    turns = [Turn("system", (body.system,))] if body.system else []
    turns.append(Turn("user", placed(body.prompt or "", _pictures(body.images, "images"))))
    if body.raw:
        options |= {"raw": True}
        options.pop("thinking", None)
    return asked_of(turns, options, info, kind="ollama generate")


def _turn(message: OllamaMessage, at: int) -> Turn:
    calls = tuple({"name": call.function.name, "arguments": call.function.arguments} for call in message.tool_calls or ())
    if calls and message.role != "assistant":
        raise ApiError(400, "invalid_value", "tool_calls belong to the assistant", param=f"messages.{at}.tool_calls")
    pictures = _pictures(message.images, f"messages.{at}.images")
    return Turn(message.role, placed(message.content or "", pictures), calls)


def placed(text: str, pictures: tuple[PictureUrl, ...]) -> tuple[str | Visual, ...]:
    """A text with its pictures: each mark takes the next one; those for which there is no mark stand before the text."""
    pieces = text.split(_MARK) if pictures else [text]
    marks = min(len(pieces) - 1, len(pictures))
    before, inside = pictures[: len(pictures) - marks], pictures[len(pictures) - marks :]
    parts: list[str | Visual] = [*before]
    for piece, picture in zip(pieces, inside, strict=False):
        parts += [piece.strip("\n"), picture] if piece.strip() else [picture]
    rest = _MARK.join(pieces[marks:])
    return (*parts, rest.lstrip("\n") if marks else rest)


def _pictures(images: list[str] | None, where: str) -> tuple[PictureUrl, ...]:
    return tuple(PictureUrl(image, param=f"{where}.{at}") for at, image in enumerate(images or ()))


def _options(body: OllamaChatBody | OllamaGenerateBody, info: EngineInfo, settings: Settings) -> dict[str, Any]:
    given = body.options or OllamaOptions()
    options = {ours: value for name, ours in _COPIED.items() if (value := getattr(given, name)) not in (None, "", [])}
    told = body.temperature if given.temperature is None else given.temperature
    temperature = settings.temperature if told is None else told
    seed = given.seed if given.seed is not None and given.seed >= 0 else None
    options |= drawing_options(temperature, given.top_k, given.top_p, given.min_p, seed)
    longest = body.max_tokens if given.num_predict is None else given.num_predict
    if longest is not None and longest > 0:
        options["max_new_tokens"] = longest
    guard = settings.repeat_guard if given.repeat_guard is None else given.repeat_guard
    if guard:
        options["repeat_guard"] = guard
    if body.format:
        options["json_schema"] = {"type": "object"} if body.format == "json" else body.format
    if body.think and "json_schema" not in options:
        if not info.thinking and body.think is True:
            raise ApiError(400, "invalid_value", "this model does not know thinking; leave think out", param="think")
        if info.thinking:
            options["thinking"] = True
    if body.logprobs:
        options["logprobs"] = True
        if body.top_logprobs:
            options["top_logprobs"] = body.top_logprobs
    return options
