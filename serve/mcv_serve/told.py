"""What is told of an answer, whatever the dialect: its channels, its tokens, its pictures and its times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcv_runtime import Answer, Completion, Engine, Prompt
from mcv_runtime.bundle.manifest import PlaceholderSpec
from mcv_runtime.text.prompts import slice_tokens
from mcv_serve.asked import Asked
from mcv_serve.channels import CALL, CALL_END, Channels, Part
from mcv_serve.tools import ANY, Call, read_call

_REASONS = {"stop": "stop", "cancelled": "stop"}


@dataclass(frozen=True, slots=True)
class Told:
    """A completion, its channels told apart."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]
    finish_reason: str
    details: dict[str, str] | None
    """Why it ended, where the dialects have no word for that."""


def channels_of(asked: Asked) -> Channels:
    """For one completion of that request."""
    return Channels(thinking=bool(asked.options.get("thinking")), calls=bool(asked.tools) and asked.forced is None)


def told(completion: Completion, asked: Asked) -> Told:
    """A whole completion."""
    channels = channels_of(asked)
    parts = [*channels.push(completion.text), *channels.finish()]
    return told_of(parts, completion, asked)


def told_of(parts: Sequence[Part], completion: Completion, asked: Asked) -> Told:
    """A completion whose parts are known."""
    texts = {"reasoning": "", "content": ""}
    calls: list[Call] = []
    for part in parts:
        if part.channel != "call":
            texts[part.channel] += part.text
        elif (call := read_call(part.text, asked.tools)) is not None:
            calls.append(call)
        else:
            texts["content"] += uncalled(part.text)
    if asked.forced is not None and completion.stop_reason == "stop":
        call = read_call(texts["content"], asked.tools, asked.forced)
        if call is not None:
            calls, texts["content"] = [call], ""
    elif asked.forced is not None and asked.forced != ANY:
        calls, texts["content"] = [Call(asked.forced, texts["content"])], ""  # as far as it came
    reason, details = ending(completion)
    if calls and reason == "stop":
        reason = "tool_calls"
    return Told(texts["content"], texts["reasoning"], tuple(calls), reason, details)


def uncalled(text: str) -> str:
    """A call of nothing that is known, as text."""
    return f"{CALL}\n{text}\n{CALL_END}"


def ending(completion: Completion) -> tuple[str, dict[str, str] | None]:
    """The reason in the dialects' words, and more about one for which they have none."""
    reason = completion.stop_reason
    return _REASONS.get(reason, "length"), None if reason in ("stop", "length") else {"type": reason}


def usage(answer: Answer, copies: int = 1) -> dict[str, Any]:
    """Tokens of prompt and answer: those that were known, and those that are pictures, among them."""
    made = copies * len(answer.tokens) + sum(len(other.tokens) for other in answer.alternatives)
    return {
        "prompt_tokens": len(answer.prompt_tokens),
        "completion_tokens": made,
        "total_tokens": len(answer.prompt_tokens) + made,
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens, "image_tokens": visual_tokens(answer)},
    }


def visual_tokens(answer: Answer) -> int:
    """Of the prompt."""
    return sum(len(picture.embeds) for picture in answer.pictures)


def timings(answer: Answer) -> dict[str, Any]:
    """Under llama-server's names, with what pictures took."""
    times, read = answer.timings, len(answer.prompt_tokens) - answer.reused_tokens
    return {
        "cache_n": answer.reused_tokens,
        "prompt_n": read,
        "prompt_ms": round(times.prefill * 1e3, 2),
        "prompt_per_second": round(read / times.prefill, 2) if times.prefill else None,
        "predicted_n": len(answer.tokens),
        "predicted_ms": round(times.decode * 1e3, 2),
        "predicted_per_second": None if answer.tokens_per_s is None else round(answer.tokens_per_s, 2),
        "picture_decode_ms": round(times.preprocess * 1e3, 2),
        "picture_encode_ms": round(times.vision * 1e3, 2),
    }


def pictures(answer: Answer) -> list[dict[str, Any]]:
    """How each picture was cut: its size and its slices in pixels, the grid's columns and rows, and its visual tokens."""
    return [
        {
            "size": picture.size,
            "grid": [picture.grid.columns, picture.grid.rows] if picture.grid.columns else None,
            "slice_sizes": picture.grid.sizes,
            "visual_tokens": len(picture.embeds),
        }
        for picture in answer.pictures
    ]


def cuts(prompt: Prompt, placeholder: PlaceholderSpec) -> list[dict[str, Any]]:
    """How each picture of a prompt will be cut, and the visual tokens of each slice; the overview is the first."""
    return [
        {
            "grid": [grid.columns, grid.rows] if grid.columns else None,
            "slice_sizes": grid.sizes,
            "slice_tokens": slice_tokens(placeholder, grid),
        }
        for grid in prompt.grids
    ]


def token_logprobs(engine: Engine, completion: Any, start: int = 0) -> list[dict[str, Any]]:
    """Of each token from `start` on: its text, its log-probability, and the likeliest ones. A completion or a piece."""
    top = completion.top_logprobs or ()
    return [
        {
            **_token(engine, token, logprob),
            "top_logprobs": [_token(engine, other, its) for other, its in (top[at] if at < len(top) else ())],
        }
        for at, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs or (), strict=True))
        if at >= start
    ]


def _token(engine: Engine, token: int, logprob: float) -> dict[str, Any]:
    text = engine.detokenize([token])
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
