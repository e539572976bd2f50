"""What is asked, whatever the dialect: the form in which a request reaches the service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PictureUrl:
    """A picture as a body names it: a `data:` URL, bare base64, or an address."""

    url: str
    is_video: bool = False
    param: str | None = None
    """Where it stands in the body."""

    @property
    def size(self) -> int:
        """Bytes of it that wait in memory."""
        return len(self.url)


@dataclass(frozen=True, slots=True)
class PictureData:
    """A picture as it was sent."""

    data: bytes = field(repr=False)
    is_video: bool = False
    param: str | None = None

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class FrameUrls:
    """A video as a list of its frames."""

    urls: tuple[str, ...] = field(repr=False)
    fps: float = 1.0
    param: str | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.urls))


Visual = PictureUrl | PictureData | FrameUrls


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: a role, and texts and pictures in their order."""

    role: str
    parts: tuple[str | Visual, ...]
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`{"name": ..., "arguments": {...}}` each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request."""

    turns: tuple[Turn, ...]
    options: Mapping[str, Any]
    """Of the runtime's `Options`, by name."""
    kind: str
    """The route that it came by, for metrics and the log."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """As the chat template takes them."""
    forced: str | None = None
    """`*`: one of the tools must be called; else the name of the one."""
    copies: int = 1
    """So many times the same answer: `n` of a request that draws nothing."""

    @property
    def visuals(self) -> Sequence[Visual]:
        return [part for turn in self.turns for part in turn.parts if not isinstance(part, str)]

    @property
    def deterministic(self) -> bool:
        """Whether asking again gives the same answer."""
        return not self.options.get("temperature") or self.options.get("seed") is not None
