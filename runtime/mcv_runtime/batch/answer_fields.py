"""An answer, or why there is none, as the rows of a batch and `--json` have it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mcv_runtime.errors import McvError, printable
from mcv_runtime.request.answer import Answer, Completion

TIMINGS = ("preprocess", "vision", "prefill", "decode")
"""Seconds of each request."""
_LONGEST = 2000
"""Characters of an error: what it quotes may be a stranger's."""


def answer_fields(answer: Answer, *, regions: bool = False) -> dict[str, Any]:
    """What is written of an answer; `regions`: with the places that it names in its one picture."""
    told: dict[str, Any] = {
        "answer": answer.text,
        "stop_reason": answer.stop_reason,
        "tokens": len(answer.tokens),
        "prompt_tokens": len(answer.prompt_tokens),
        "timings": {name: round(getattr(answer.timings, name), 4) for name in TIMINGS},
    }
    told |= {name: value for name in ("score", "logprobs") if (value := getattr(answer, name)) is not None}
    if answer.alternatives:
        told["alternatives"] = [completion_report(one) for one in answer.alternatives]
    return {**told, **regions_report(answer, asked=regions)}


def completion_report(completion: Completion) -> dict[str, Any]:
    """One of several answers, as JSON has it."""
    names = ("text", "tokens", "stop_reason", "logprobs", "score")
    return {name: getattr(completion, name) for name in names}


def regions_report(answer: Answer, *, asked: bool) -> dict[str, Any]:
    """The places that an answer names in its one picture, as JSON has them; nothing where nobody asked for places."""
    return {"regions": [asdict(region) for region in answer.regions()]} if asked and len(answer.pictures) == 1 else {}


def error_line(error: Exception) -> str:
    """Why there is no answer."""
    said = str(error) if isinstance(error, McvError) else f"{type(error).__name__}: {error}"
    line = printable(" ".join(said.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
