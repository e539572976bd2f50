"""What a server may be told: every setting once, with its meaning and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcv_runtime import OptionError
from mcv_runtime.errors import shown

NETWORK, LIMITS, SAFETY, MACHINE = "Name and network", "Limits", "Safety", "Model and machine"


def _setting(default: Any, group: str, meaning: str, flag: str | None = None) -> Any:
    """A field, what it means, and the flag that sets it (default: its name)."""
    return field(default=default, metadata={"group": group, "help": meaning, "flag": flag})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one server, besides those of its engine; `mcv-serve` has a flag for each but the keys."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Whoever shows one of these is served; empty: everybody is."""
    model_name: str | None = _setting(None, NETWORK, "What to call the model; by default as its bundle says.")
    temperature: float = _setting(0.0, NETWORK, "Of requests that name none; 0: the likeliest tokens.")
    repeat_guard: int = _setting(0, NETWORK, "End answers whose last N tokens say one thing over and over; 0: do not.")
    concurrent: int = _setting(16, LIMITS, "Requests that are prepared or computed together.")
    queue: int = _setting(2048, LIMITS, "Requests that may wait for that; more are refused with 429.")
    queue_mb: float = _setting(2048.0, LIMITS, "Most of texts and pictures of all requests that wait or are computed.")
    deadline_s: float = _setting(1800.0, LIMITS, "Seconds after which an answer ends as far as it is.", "--deadline")
    drain_s: float = _setting(30.0, LIMITS, "Seconds that requests may go on after SIGTERM.", "--drain")
    keep_alive_s: float = _setting(15.0, LIMITS, "A stream says something at least so often (s).", "--keep-alive")
    body_mb: float = _setting(64.0, LIMITS, "Largest request.")
    body_s: float = _setting(60.0, LIMITS, "Seconds that a client may take to send one.")
    pictures: int = _setting(64, LIMITS, "Pictures and videos of a request.")
    picture_mb: float = _setting(20.0, LIMITS, "Largest picture, still encoded.")
    max_tokens: int | None = _setting(None, LIMITS, "Longest answer that may be asked for.")
    answers: int = _setting(16, LIMITS, "Most n of a request.")
    image_hosts: tuple[str, ...] = _setting(
        (), SAFETY, "A host from which pictures may be fetched, by https; may be repeated.", "--allow-image-host"
    )
    fetch_s: float = _setting(20.0, SAFETY, "Seconds to fetch a picture.")
    origins: tuple[str, ...] = _setting(
        (), SAFETY, "Origin of pages that a browser may let ask (CORS); *: all.", "--allow-origin"
    )
    log_content: bool = _setting(False, SAFETY, "Let what is asked and answered stand in the log.")
    isolate: bool = _setting(False, SAFETY, "Decode pictures in a process that may open no file and no connection.")
    state: Path | None = _setting(  # noqa: RUF009 - it makes a field
        None, MACHINE, "File for the beginnings that were read, for a restart.", "--save-state"
    )
    save_s: float = _setting(300.0, MACHINE, "Seconds between savings of that while nobody asks.", "--save-every")

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
                    f"--allow-image-host takes the name of a host, for example pictures.example.org, not {shown(host)}"
                )
