"""One of several requests that are answered together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mcv_runtime.request.options import Options
from mcv_runtime.request.preparation import Messages, PictureSource, question


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What `Engine.ask` takes, for `Engine.batch`."""

    images: PictureSource | Sequence[PictureSource] | None
    prompt: str
    system: str | None = None
    options: Options = field(default_factory=Options)

    @property
    def messages(self) -> Messages:
        return question(self.images, self.prompt, self.system)
