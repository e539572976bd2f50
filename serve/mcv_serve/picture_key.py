"""Which picture a request is about, by its body's bytes alone, so that equal pictures can go to one replica."""

from __future__ import annotations

import hashlib
import re

_PICTURE = re.compile(
    rb"data:[^,\"\\]{0,200};base64,([^\"\\]+)"  # OpenAI's dialect, anywhere
    rb"|\"url\"\s*:\s*\"(?!data:)([^\"\\]+)\""
    rb"|\"images\"\s*:\s*\[\s*\"([^\"\\]+)\""  # Ollama's
)


def picture_key(body: bytes) -> str:
    """The digest of the first picture in a body, however its dialect gives it; empty if there is none, or none is found."""
    found = _PICTURE.search(body)
    return hashlib.sha256(next(filter(None, found.groups()))).hexdigest()[:32] if found else ""
