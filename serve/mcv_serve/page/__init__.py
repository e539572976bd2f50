"""The page at `/`: plain HTML, CSS and JavaScript that asks the server's own routes. Needs no key; what it asks does."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Content and type by path."""
    found = files(__name__).joinpath("static").iterdir()
    return {
        "/" if file.name == "index.html" else f"/page/{file.name}": (file.read_bytes(), kind)
        for file in found
        if (kind := _TYPES.get("." + file.name.rpartition(".")[2]))
    }


def paths() -> frozenset[str]:
    """All that belongs to the page; anybody may read it."""
    return frozenset(_files())


def router() -> APIRouter:
    """Its routes."""
    routes = APIRouter(include_in_schema=False)

    async def give(request: Request) -> Response:
        content, kind = _files()[request.scope["route"].path]
        return Response(content, media_type=kind, headers=_HEADERS)

    for path in paths():
        routes.add_api_route(path, give, methods=["GET", "HEAD"])
    return routes
