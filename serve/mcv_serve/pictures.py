"""From what a body calls a picture to bytes, and from these to what the runtime takes."""

from __future__ import annotations

import base64
import binascii
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mcv_runtime import Video
from mcv_serve.asked import Asked, FrameUrls, PictureData, PictureUrl, Visual
from mcv_serve.errors import ApiError

Fetch = Callable[[str], bytes]
"""Gets a picture from an address."""
Decode = Callable[[bytes], Any]
"""Makes encoded bytes what the runtime takes for a picture."""
_DATA = re.compile(r"data:[^,]{0,200}?(;base64)?,", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def bytes_of(visual: PictureUrl | PictureData, fetch: Fetch, limit: int) -> bytes:
    """The encoded picture or video; its label (`data:image/jpeg`) is not believed."""
    if isinstance(visual, PictureData):
        data = visual.data
    elif (head := _DATA.match(visual.url)) is not None:
        if head[1] is None:
            raise ApiError(400, "invalid_image", "a data: URL of a picture must be base64", param=visual.param)
        data = _decoded(visual.url, head.end(), visual.param, limit)
    elif (scheme := _SCHEME.match(visual.url)) is None:
        data = _decoded(visual.url, 0, visual.param, limit)
    elif scheme[1].lower() == "https":
        data = fetch(visual.url)
    else:
        known = scheme[1].lower() in ("http", "file", "ftp", "data")
        what = f"pictures are not read from {scheme[1].lower()}: URLs" if known else "this is no picture's URL"
        raise ApiError(400, "invalid_image_url", f"{what}; send a data: URL with base64", param=visual.param)
    if not data:
        raise ApiError(400, "invalid_image", "the picture is empty", param=visual.param)
    if len(data) > limit:
        raise _too_large(visual.param, limit)
    return data


def _decoded(text: str, start: int, param: str | None, limit: int) -> bytes:
    if len(text) - start > 2 * limit + 1024:
        raise _too_large(param, limit)
    payload = "".join(text[start:].replace("-", "+").replace("_", "/").split()).rstrip("=")
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(
            400, "invalid_image", "the picture is neither a data: URL with base64 nor bare base64", param=param
        ) from None


def _too_large(param: str | None, limit: int) -> ApiError:
    return ApiError(413, "image_too_large", f"a picture has more than {limit / 1e6:,.0f} MB", param=param)


@contextmanager
def messages_of(asked: Asked, fetch: Fetch, decode: Decode, limit: int) -> Iterator[list[dict[str, Any]]]:
    """The messages as the runtime takes them. Videos lie in files meanwhile, which only this user can open."""
    with ExitStack() as stack:

        def ready(part: str | Visual) -> Any:
            if isinstance(part, str):
                return part
            if isinstance(part, FrameUrls):
                frames = [PictureUrl(url, param=part.param) for url in part.urls]
                return Video([decode(bytes_of(frame, fetch, limit)) for frame in frames], fps=part.fps)
            data = bytes_of(part, fetch, limit)
            return Video(stack.enter_context(_in_file(data))) if part.is_video else decode(data)

        messages = []
        for turn in asked.turns:
            message: dict[str, Any] = {"role": turn.role, "content": [ready(part) for part in turn.parts]}
            if turn.tool_calls:
                message["tool_calls"] = list(turn.tool_calls)
            messages.append(message)
        yield messages


@contextmanager
def _in_file(data: bytes) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix="mcv-serve-", suffix=".video")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
