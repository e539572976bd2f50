"""Telling whoever waits how far a request is, and letting him end it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

Stage = Literal["pictures", "slices", "prompt", "answer"]


class Event(NamedTuple):
    """So much of a stage is done: pictures encoded, slices (or frames) through the tower, tokens read, tokens made."""

    stage: Stage
    done: int
    total: int
    """0: nobody knows."""


Progress: TypeAlias = Callable[[Event], object]
"""Called in the thread of the request, between two runs of a graph. What it raises ends the request, and nothing else."""

Report: TypeAlias = Callable[[Stage, int, int], object]
"""The same inside the runtime: stage, done, total."""


def silent(stage: Stage, done: int, total: int) -> None:
    """A report that nobody reads."""
