"""/vqa: a form with a picture and a question, for people with curl and pages with an upload."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from mcv_runtime.errors import shown
from mcv_serve import body as bodies
from mcv_serve import told
from mcv_serve.asked import Asked, PictureData, Turn
from mcv_serve.errors import ApiError
from mcv_serve.replying import whole
from mcv_serve.service import Service

_OPTIONS = {"max_tokens": "max_new_tokens", "max_slice_nums": "max_slice_nums"}
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "question"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "question": {"type": "string", "minLength": 1},
        "max_tokens": {"type": "integer", "minimum": 1},
        "max_slice_nums": {"type": "integer", "minimum": 1},
    },
}


def router(service: Service) -> APIRouter:
    """Its route."""
    routes = APIRouter(tags=["server"])
    described = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}

    @routes.post("/vqa", openapi_extra=described)
    async def ask(request: Request) -> dict[str, Any]:
        pictures, fields = await _form(request, service)
        question = fields.pop("question", "")
        if not pictures or not question.strip():
            missing = "file" if not pictures else "question"
            raise ApiError(400, "invalid_value", f"the form has no {missing}", param=missing)
        options: dict[str, Any] = {}
        for name, text in fields.items():
            if name not in _OPTIONS:
                raise ApiError(400, "unknown_parameter", f"this server knows no field {shown(name)}; leave it out", param=name)
            if not (text.isascii() and text.isdigit() and 0 < int(text[:10]) < 1 << 20):
                raise ApiError(400, "invalid_value", f"{name} must be a whole number above 0", param=name)
            options[_OPTIONS[name]] = int(text)
        if service.settings.repeat_guard:
            options["repeat_guard"] = service.settings.repeat_guard
        asked = Asked(turns=(Turn("user", (*pictures, question)),), options=options, kind="vqa")
        _, answer = await whole(service, asked, request, None)
        reason, details = told.ending(answer)
        return {
            "answer": answer.text,
            "model": service.model,
            "finish_reason": reason,
            **({"finish_details": details} if details else {}),
            "usage": told.usage(answer),
            "timings": told.timings(answer),
            "pictures": told.pictures(answer),
        }

    return routes


async def _form(request: Request, service: Service) -> tuple[list[PictureData], dict[str, str]]:
    """The files and the fields. The body is read first, within its limits."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", "send a multipart form with `file` and `question`")
    data = await bodies.read(request, service.settings)
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary")
    if not boundary or b"--" + boundary + b"--" not in data[-len(boundary) - 16 :]:  # the parser would take what there is
        raise ApiError(400, "invalid_form", "the form is cut off, or says nothing of its boundary")
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    again = Request(request.scope, receive)
    most = service.settings.pictures
    pictures: list[PictureData] = []
    fields: dict[str, str] = {}
    try:
        async with again.form(max_files=most, max_fields=16, max_part_size=1 << 20) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("file", "image"):
                        raise ApiError(400, "unknown_parameter", "pictures are sent as `file`", param=name)
                    pictures.append(PictureData(await value.read(), param="file"))
                elif name in fields:
                    raise ApiError(400, "invalid_value", f"the field {shown(name)} stands twice", param=name)
                else:
                    fields[name] = value
    except (MultiPartException, FormParserError, UnicodeDecodeError, KeyError) as error:
        raise ApiError(400, "invalid_form", f"the form cannot be read ({type(error).__name__})") from None
    return pictures, fields
