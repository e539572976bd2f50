"""What a request can be refused with, and how each dialect says it."""

from __future__ import annotations

from typing import Any, Literal

from fastapi.responses import JSONResponse

from mcv_runtime import ImageError, McvError, OptionError, PromptError, ResourceError, RunError

Dialect = Literal["openai", "ollama"]
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_RUNTIME: tuple[tuple[type[McvError], int, str], ...] = (
    (ImageError, 400, "invalid_image"),
    (OptionError, 400, "invalid_value"),
    (PromptError, 400, "invalid_prompt"),
    (ResourceError, 400, "insufficient_memory"),
    (RunError, 500, "engine_error"),
)


class ApiError(Exception):
    """A refusal: an HTTP status, a code for programs, a line for people, and the field it is about."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after if retry_after is not None or status not in (429, 503) else 1.0

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """Whatever went wrong, as a refusal; what nobody foresaw says nothing about itself."""
        if isinstance(error, ApiError):
            return error
        for kind, status, code in _RUNTIME:
            if isinstance(error, kind):
                if "context holds" in str(error):
                    code = "context_length_exceeded"
                return cls(status, code, str(error))
        if isinstance(error, McvError):
            return cls(500, "engine_error", str(error))
        if isinstance(error, MemoryError):
            return cls(503, "insufficient_memory", "there is not enough memory for this request now", retry_after=5.0)
        return cls(500, "internal_error", f"the server failed ({type(error).__name__}); its log says more")

    def body(self, dialect: Dialect) -> dict[str, Any]:
        """The JSON that says it."""
        if dialect == "ollama":
            return {"error": self.message, "code": self.code}
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, dialect: Dialect) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(dialect), self.status, headers)


def dialect_of(path: str) -> Dialect:
    """Of a route: Ollama's begin with /api/."""
    return "ollama" if path.startswith("/api/") else "openai"
