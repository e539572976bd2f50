"""A request: what is asked, and how it shall be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

from mcv_runtime.errors import OptionError
from mcv_runtime.request.options import Keywords, Options
from mcv_runtime.request.preparation import Messages, PictureSource, question


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One question about one picture, several or none; or `messages`, of which the last one is answered."""

    images: PictureSource | Sequence[PictureSource] | None = None
    prompt: str = ""
    system: str | None = None
    options: Options = field(default_factory=Options)
    messages: Messages | None = None
    """`{"role": "system", "user" or "assistant", "content": text or list of texts and pictures}`, instead of those above."""

    def __post_init__(self) -> None:
        if not isinstance(self.options, Options):
            raise OptionError(f"options are Options(...), not {type(self.options).__name__}")
        if self.messages is not None and (self.images is not None or self.prompt or self.system is not None):
            raise OptionError("a request has messages, or images and a prompt; leave one of them out")

    @property
    def conversation(self) -> Messages:
        """All that is asked as messages."""
        return question(self.images, self.prompt, self.system) if self.messages is None else self.messages


def with_options(request: Request, **changes: Unpack[Keywords]) -> Request:
    """The same request with other options."""
    return replace(request, options=Options.of(request.options, changes))
