"""Functions that a model may call: how they are told to it, how a call is forced, and how calls are read.

Where the checkpoint's chat template knows tools, it writes them. Other models are told in the system prompt, in the form that
most of them have seen: a JSON object between <tool_call> marks, what came of it between <tool_response> marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mcv_runtime import McvError
from mcv_runtime.files import parse_json
from mcv_serve.asked import Turn
from mcv_serve.channels import CALL, CALL_END
from mcv_serve.errors import ApiError

ANY = "*"
"""Whichever of the functions the model chooses."""
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)


class Call(NamedTuple):
    """A function's name and what is given to it, as JSON text."""

    name: str
    arguments: str


def schema_of(tools: Sequence[Mapping[str, Any]], forced: str) -> dict[str, Any]:
    """The JSON schema of a forced call: of the named function's arguments, or of a name and its arguments."""
    functions = {tool["function"]["name"]: _parameters(tool) for tool in tools}
    if forced != ANY:
        if forced not in functions:
            raise ApiError(400, "invalid_value", "tool_choice names a function that tools lack", param="tool_choice")
        return functions[forced]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in functions.items()
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    given = tool["function"].get("parameters")
    return dict(given) if given else {"type": "object", "properties": {}, "additionalProperties": False}


def read_call(text: str, tools: Sequence[Mapping[str, Any]], forced: str | None = None) -> Call | None:
    """The call that stands in the text, in either of the two forms; None where it is none of the functions."""
    names = {tool["function"]["name"]: tool["function"] for tool in tools}
    if forced is not None and forced != ANY:
        return Call(forced, text.strip())
    if (found := _FUNCTION.search(text)) is not None:
        name = found[1].strip()
        if name not in names:
            return None
        properties = (names[name].get("parameters") or {}).get("properties") or {}
        given = {key.strip(): _typed(value, properties.get(key.strip())) for key, value in _PARAMETER.findall(found[2])}
        return Call(name, json.dumps(given, ensure_ascii=False))
    try:
        value = parse_json(text.strip(), "the call", error=_NoCallError)
    except _NoCallError:
        return None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}", "the arguments", error=_NoCallError)
        except _NoCallError:
            return None
    return Call(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


class _NoCallError(McvError, ValueError):
    """The text is no JSON."""


def _typed(text: str, schema: Any) -> Any:
    """A parameter's text as its schema wants it: JSON, unless a text is wanted."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string":
        return text
    try:
        return parse_json(text, "a parameter", error=_NoCallError)
    except _NoCallError:
        return text


def in_words(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """The conversation for a template that knows no tools: these in the system prompt, calls and what they gave as text."""
    written: list[Turn] = []
    for turn in turns:
        calls = [json.dumps({"name": c["name"], "arguments": c["arguments"]}, ensure_ascii=False) for c in turn.tool_calls]
        text = "\n".join(f"{CALL}\n{call}\n{CALL_END}" for call in calls)
        parts: tuple[Any, ...] = (*turn.parts, text) if text else turn.parts
        if turn.role == "tool":
            parts = ("<tool_response>", *parts, "</tool_response>")
            if written and written[-1].role == "user" and written[-1].parts[-1:] == ("</tool_response>",):
                written[-1] = replace(written[-1], parts=(*written[-1].parts, *parts))
                continue
        written.append(Turn("user" if turn.role == "tool" else turn.role, parts))
    if not tools:
        return tuple(written)
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = (
        f"You can call these functions, each described by a JSON object:\n{listed}\n\nTo call one, write {CALL}, then a JSON"
        f' object with its "name" and its "arguments", then {CALL_END}, and nothing after that. What it gives comes back'
        " between <tool_response> and </tool_response>. Answer without a call where none is needed."
    )
    if written and written[0].role == "system":
        return (replace(written[0], parts=(*written[0].parts, told)), *written[1:])
    return (Turn("system", (told,)), *written)
