"""Run something in a process of its own, and say how it ended."""

from __future__ import annotations

import json
import math
import os
import resource
import selectors
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias

from mcv_runtime.errors import McvError

Ending: TypeAlias = Literal["done", "refused", "untidy", "traceback", "crash", "hang"]
"""`refused`: one line of ours; `untidy`: several, a very long one, or one that a terminal would obey."""
_PATIENCE = 20
"""How much longer a process may take than its time of a processor, beside others."""
LINE = 1000
"""Characters of the longest line, which may name a path or two."""


@dataclass(frozen=True, slots=True)
class Case:
    """One damaged file, and what reads it."""

    what: str
    read: Callable[[], Any]


Draw: TypeAlias = Callable[[Random], Case]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended, and what it took."""

    ending: Ending
    said: str = ""
    where: str = ""
    cpu_s: float = 0.0
    memory_mb: int = 0
    """Most of the process's memory."""


def run(read: Callable[[], Any], *, limit_s: float, memory_gb: float) -> Outcome:
    """Call `read` in a fork with so much memory, and kill it after `limit_s` or so many seconds of a processor."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            told = json.dumps(asdict(_attempt(read, int(memory_gb * 2**30), math.ceil(limit_s))))
            os.write(writing, told.encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    data, late = _all(reading, time.monotonic() + _PATIENCE * limit_s)
    if late:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status, used = os.wait4(child, 0)
    took = {"cpu_s": round(used.ru_utime + used.ru_stime, 3), "memory_mb": used.ru_maxrss // 1024}
    if late:
        return Outcome(ending="hang", said=f"not done after {limit_s} s", **took)
    if not data and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return Outcome(ending="hang", said=f"not done after {limit_s} s of a processor", **took)
    if not data:
        killed = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
        return Outcome(ending="crash", said=killed, **took)
    return Outcome(**json.loads(data) | took)


def _attempt(read: Callable[[], Any], memory: int, cpu_s: int) -> Outcome:
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, cpu_s)):
        with suppress(ValueError, OSError):  # a machine that allows less has its own limit
            # a second more before the kernel kills, so that what is killed for its time can be told from a crash
            resource.setrlimit(kind, (most, most + (kind == resource.RLIMIT_CPU)))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        return Outcome(ending="done", said=str(read())[:200])
    except McvError as error:
        tidy = len(str(error)) <= LINE and str(error).isprintable()
        return Outcome(
            ending="refused" if tidy else "untidy", said=f"{type(error).__name__}: {error}"[:300], where=_place(error)
        )
    except BaseException as error:
        return Outcome(ending="traceback", said=f"{type(error).__name__}: {error}"[:300], where=_place(error))


def _place(error: BaseException) -> str:
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "mcv_" in frame.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""


def _all(pipe: int, until: float) -> tuple[bytes, bool]:
    data = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        while waiting.select(max(until - time.monotonic(), 0)):
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return data, False
            data += piece
    return data, True
