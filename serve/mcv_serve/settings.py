"""What a server may be told: every setting once, with its meaning and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from mcv_runtime import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one server, besides those of its engine."""

    model_name: str | None = None
    """What the model is called in answers; by default as its bundle says."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Whoever shows one of these is served; empty: everybody is."""
    concurrent: int = 16
    """Requests that are prepared or computed at the same time."""
    queue: int = 2048
    """Requests that wait for that; more are refused with 429."""
    queue_mb: float = 2048.0
    """Most of texts and pictures of all requests that wait or are computed."""
    deadline_s: float = 1800.0
    """After so many seconds an answer ends as far as it is."""
    drain_s: float = 30.0
    """How long what runs may go on after SIGTERM."""
    keep_alive_s: float = 15.0
    """A stream that is silent so long gets a comment, so that no proxy takes it for dead."""
    body_mb: float = 64.0
    body_s: float = 60.0
    """How long a client may take to send its request."""
    pictures: int = 64
    """Pictures and videos of one request."""
    picture_mb: float = 20.0
    """Of one that is fetched or sent, still encoded."""
    max_tokens: int | None = None
    """Longest answer that a request may ask for."""
    answers: int = 16
    """Most `n` of a request."""
    temperature: float = 0.0
    """Of requests that name none."""
    repeat_guard: int = 0
    """End answers whose last so many tokens say one thing over and over; 0: do not."""
    image_hosts: tuple[str, ...] = ()
    """From where pictures may be fetched, by https alone; empty: from nowhere."""
    fetch_s: float = 20.0
    origins: tuple[str, ...] = ()
    """Origins of pages that a browser may let ask (CORS); `*`: of all."""
    log_content: bool = False
    """Write what is asked and answered into the log."""
    isolate: bool = False
    """Decode pictures in a process of their own that may open no file and no connection."""
    state: Path | None = None
    """Where the beginnings that were read are kept over a restart."""
    save_s: float = 300.0
    """How often that is written while nobody asks, so that a killed process leaves something."""

    def __post_init__(self) -> None:
        for name in ("concurrent", "pictures", "answers"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("queue_mb", "deadline_s", "keep_alive_s", "body_mb", "body_s", "picture_mb", "fetch_s", "save_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.queue < 0 or not 0 <= self.drain_s < math.inf:
            raise OptionError("queue and drain_s must be at least 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OptionError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise OptionError("an API key is empty, or has spaces or letters beyond ASCII")
        for host in self.image_hosts:
            if not host or any(mark in host for mark in "/:@* "):
                raise OptionError(
                    f"--allow-image-host takes the name of a host, for example pictures.example.org, not {host!r}"
                )
