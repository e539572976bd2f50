"""A request as OpenAI's batches have it, in the words that vLLM's `run-batch` understands too, as a request of ours.

`{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], ...}}`, a line each. What
stands in it is understood, known to change no answer, or refused; nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from mcv_runtime.batch.answer_fields import error_line
from mcv_runtime.batch.remote import is_store_address
from mcv_runtime.batch.rows import BatchRow, Defaults, Located, digest_of, local, refused
from mcv_runtime.errors import OptionError, shown
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.options import Options, PictureOptions
from mcv_runtime.request.request import Request

_URL = "/v1/chat/completions"
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_PICTURE_OPTIONS = {field.name for field in dataclasses.fields(PictureOptions)}
_SAME = {field.name for field in dataclasses.fields(Options)} - {"cancel", "progress", "tools", "raw", "timeout"}
_OURS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "enable_thinking": "thinking",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choices",
}
_FORMS = {"json": "json_schema", "regex": "regex", "choice": "choices"}
"""Of `structured_outputs`."""
_WITHOUT_EFFECT = frozenset({"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""The bundle answers, whatever model is named."""
_DRAWN = ("top_p", "top_k", "min_p", "seed")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def chat_row(number: int, fields: Mapping[str, Any], located: Located, defaults: Defaults) -> BatchRow:
    """The row; one with an error if it makes no sense."""
    try:
        body = _body(fields)
        options = Options.of(defaults.options, {**_least_slices(body.get("messages")), **_options(body)})
        request = Request(options=options, messages=_messages(body.get("messages"), located))
    except Exception as error:  # whatever it is, the other rows are not to blame
        return refused(number, error_line(error), fields)
    digest = digest_of(fields, options.given(), defaults.model)
    return BatchRow(number=number, digest=digest, request=request, said={"custom_id": fields["custom_id"]})


def _body(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in sorted(fields.keys() - {"custom_id", "method", "url", "body"}):
        raise OptionError(f"a request of a batch has no field {shown(name)}")
    if not isinstance(fields.get("custom_id"), str) or not isinstance(fields.get("body"), dict):
        raise OptionError("a request of a batch has a custom_id, which is a text, and a body, which is an object")
    if fields.get("method", "POST") != "POST" or fields.get("url", _URL) != _URL:
        raise OptionError(f"a batch takes POST {_URL}, not {shown(fields.get('method'))} {shown(fields.get('url'))}")
    return {name: value for name, value in fields["body"].items() if value is not None and name not in _WITHOUT_EFFECT}


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}

    def take(given: Mapping[str, Any]) -> None:
        if twice := sorted(given.keys() & options.keys()):
            raise OptionError(f"the body says {twice[0]} twice, under two names")
        options.update(given)

    for name, value in body.items():
        if name in _SAME:
            take({name: value})
        elif name in _OURS:
            take({_OURS[name]: value})
        elif name == "response_format":
            take(_response_format(value))
        elif name == "structured_outputs":
            take({_FORMS[one]: form for one, form in _known(name, value, _FORMS).items()})
        elif name == "chat_template_kwargs":
            take({_OURS[one]: on for one, on in _known(name, value, {"enable_thinking"}).items()})
        elif name == "mm_processor_kwargs":
            take(_known(name, value, _PICTURE_OPTIONS))
        elif name == "stream" and value is not False:
            raise OptionError("a batch gives whole answers; leave out stream")
        elif name not in ("messages", "stream"):
            raise OptionError(f"the body has {shown(name)}, which is not understood here; leave it out")
    return _drawing(options)


def _drawing(options: dict[str, Any]) -> dict[str, Any]:
    """Without a temperature answers are the likeliest, and what only counts where tokens are drawn does not."""
    several = isinstance(options.get("num_return_sequences"), int) and options["num_return_sequences"] > 1
    options.setdefault("temperature", 1.0 if several else 0)
    if isinstance(options.get("top_k"), int) and options["top_k"] < 1:
        del options["top_k"]
    if options["temperature"] == 0:
        options = {name: value for name, value in options.items() if name not in (*_DRAWN, "temperature")}
    if isinstance(options.get("logit_bias"), dict):
        options["logit_bias"] = {_token(name): value for name, value in options["logit_bias"].items()}
    return options


def _token(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise OptionError(f"logit_bias gives numbers by token id, not by {shown(name)}")
    return int(name)


def _response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    schema = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise OptionError("response_format is of the type text, json_object, or json_schema with a schema")
    return {"json_schema": schema["schema"]}


def _least_slices(messages: Any) -> dict[str, int]:
    """One slice a picture where all pictures are of the detail `low`, as the service has it."""
    contents = (
        [message.get("content") for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    )
    pictures = [
        part["image_url"]
        for content in contents
        for part in (content if isinstance(content, list) else ())
        if isinstance(part, dict) and "image_url" in part
    ]
    low = [isinstance(picture, dict) and picture.get("detail") == "low" for picture in pictures]
    return {"max_slice_nums": 1} if low and all(low) else {}


def _known(name: str, value: Any, names: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or any(one not in names for one in value):
        raise OptionError(f"{name} may say {', '.join(sorted(names))}, not {shown(value)}")
    return {one: given for one, given in value.items() if given is not None}


def _messages(messages: Any, located: Located) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise OptionError("the body has no messages, a list of objects")
    return [_message(message, located) for message in messages]


def _message(message: Mapping[str, Any], located: Located) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES or message.get("tool_calls"):
        raise OptionError(f"a message of a batch is of the role {', '.join(_ROLES)}, without calls, not {shown(role)}")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": content}
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise OptionError("a message's content is a text, or a list of parts")
    return {"role": _ROLES[role], "content": [_part(part, located) for part in content]}


def _part(part: Mapping[str, Any], located: Located) -> Any:
    kind = part.get("type")
    given = part.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(given, str):
        return given
    if kind == "file" and isinstance(given, dict):
        given = given.get("file_data")
    elif isinstance(given, dict):
        given = given.get("url")
    if kind not in ("image_url", "file", "video_url") or not isinstance(given, str):
        raise OptionError(f"a part is of the type text, image_url, file or video_url, not {shown(kind)}")
    if scheme := _DATA.match(given):
        if kind == "video_url":
            raise OptionError("a video in a row is not read; save it, and name it as file:///path")
        return _decoded(given[scheme.end() :])
    is_path = given.startswith("file:///")
    if not is_path and not is_store_address(given):
        raise OptionError(f"{shown(given)} is not fetched; give a data: URL with base64, or file:///path")
    place = located(unquote(urlsplit(given).path) if is_path else given)
    return Video(local(place)) if kind == "video_url" else place


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise OptionError("a data: URL is not base64") from None
