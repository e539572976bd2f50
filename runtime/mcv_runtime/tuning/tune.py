"""Try settings one after the other, within a bounded time, and keep what is clearly faster than the default."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.decoding.prompt_pace import ALONE_S
from mcv_runtime.request.options import PREFILL_CHUNK
from mcv_runtime.sessions.cores import default_threads
from mcv_runtime.sessions.profile import KV, Profile, machine_of
from mcv_runtime.tuning.workbench import Workbench

SECONDS = 120.0
"""How long it may take, but for the measurement that is under way then."""
SLICES, PROMPT, ANSWER = 5, 512, 128
"""The question that settings are compared by: a picture of five slices, and tokens that are read and said."""
_GAIN = 0.97
"""Another setting must take less than this share of the default's time: less is noise."""
_CHUNKS = (128, 256, 1024, 2048)
_BATCHES = (1, 2, 4)
_PROBE, _STEPS = 64, 6
"""Tokens that show how fast a prompt is read, and that are decoded behind it."""
_ROUNDS = 2

Kv = Literal["float", "int8"]
Setting = Literal["threads", "prefill_chunk", "batch_slices", "kv"]
Show = Callable[[str, int, int], None]
"""What is tried, and how many of how many seconds are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One value of one setting, and the seconds that it takes; NaN: not measured, as that does not depend on it."""

    setting: Setting = "threads"
    value: int | str
    slice_s: float = math.nan
    token_s: float = math.nan
    """Of a prompt."""
    step_s: float = math.nan
    """Of an answer."""
    chosen: bool = False

    @property
    def question_s(self) -> float:
        """What the measured parts of the question take together."""
        parts = (SLICES * self.slice_s, PROMPT * self.token_s, ANSWER * self.step_s)
        return sum(part for part in parts if not math.isnan(part))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What was tried, in that order, and what came of it."""

    trials: tuple[Trial, ...]
    profile: Profile
    complete: bool
    """Whether there was time for everything."""


def tune(bundle: Bundle, *, seconds: float = SECONDS, threads: Sequence[int] = (), show: Show = lambda *_: None) -> Tuning:
    """The fastest settings for a bundle on this machine, the default where nothing is clearly faster.

    `threads`: numbers to try, the default first; else those that the machine suggests. Raises what running a graph raises.
    """
    race = _Race(seconds, show)
    best = race.run("threads", threads or thread_numbers(), partial(_with_threads, bundle))
    number = int(best.value)
    bench = Workbench(bundle, number)
    try:
        _warm_up(bench)
        fit = max(int(ALONE_S / best.token_s), 1)  # the scheduler reads no longer pieces
        chunks = [PREFILL_CHUNK, *(chunk for chunk in _CHUNKS if chunk <= fit)]
        tokens = min(max(PROMPT, *chunks), bench.longest)
        chunk = race.run("prefill_chunk", chunks, partial(_with_chunk, bench, tokens, fit), rounds=_ROUNDS)
        batch = race.run("batch_slices", _BATCHES, partial(_with_batch, bench), rounds=_ROUNDS)
    finally:
        bench.close()
    caches = KV if "decoder_with_past_kv8" in bundle.manifest.graphs else KV[:1]
    kv = race.run("kv", caches, partial(_with_cache, bundle, number)) if len(caches) > 1 else None
    profile = Profile(
        threads=number,
        prefill_chunk=int(chunk.value),
        batch_slices=int(batch.value),
        kv="int8" if kv is not None and kv.value == "int8" else "float",
        machine=machine_of(bundle),
    )
    return Tuning(trials=tuple(race.trials), profile=profile, complete=race.complete)


def thread_numbers(default: int | None = None, processors: int | None = None) -> tuple[int, ...]:
    """Threads worth trying: the default, one less (for the rest of the machine), half, and all logical processors."""
    default = default_threads() if default is None else default
    if processors is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    default = default or processors  # 0: nobody knows the cores
    others = (default - 1, default // 2, processors if default < processors else 0)
    return tuple(dict.fromkeys((default, *(number for number in others if number > 0))))


class _Race:
    """Values of one setting after the other, as long as there is time."""

    def __init__(self, seconds: float, show: Show) -> None:
        self.trials: list[Trial] = []
        self.complete = True
        self._start, self._seconds, self._show = time.perf_counter(), seconds, show

    def run(self, setting: Setting, values: Sequence[int | str], measure: Callable[[Any], Trial], rounds: int = 1) -> Trial:
        """The value that is clearly faster than the first one, or the first; each counts as in its fastest round."""
        found: dict[int | str, Trial] = {}
        took = 0.0
        for _, value in itertools.product(range(rounds), values):
            gone = time.perf_counter() - self._start
            if found and gone + took > self._seconds:
                self.complete = False
                break
            self._show(f"{setting} {value}", int(gone), int(self._seconds))
            trial = measure(value)
            took = time.perf_counter() - self._start - gone
            if value not in found or trial.question_s < found[value].question_s:
                found[value] = trial
        first = found[values[0]]
        best = min(found.values(), key=lambda trial: trial.question_s)
        chosen = best if best.question_s < _GAIN * first.question_s else first
        self.trials += [replace(trial, setting=setting, chosen=trial is chosen) for trial in found.values()]
        return chosen


def _with_threads(bundle: Bundle, number: int) -> Trial:
    bench = Workbench(bundle, number)
    try:
        _warm_up(bench)
        token_s, step_s = bench.reading_s(_PROBE, _PROBE, _STEPS)
        return Trial(value=number, slice_s=bench.slice_s(), token_s=token_s, step_s=step_s)
    finally:
        bench.close()


def _warm_up(bench: Workbench) -> None:
    """Open the graphs, and have their memory set aside."""
    bench.slice_s()
    bench.reading_s(_PROBE, _PROBE, 1)


def _with_chunk(bench: Workbench, tokens: int, fit: int, chunk: int) -> Trial:
    token_s, _ = bench.reading_s(tokens, min(chunk, fit))
    return Trial(value=chunk, token_s=token_s)


def _with_batch(bench: Workbench, batch: int) -> Trial:
    return Trial(value=batch, slice_s=bench.slice_s(batch))


def _with_cache(bundle: Bundle, threads: int, kv: Kv) -> Trial:
    bench = Workbench(bundle, threads, kv)
    try:
        bench.reading_s(_PROBE, _PROBE, 1)  # opens the graph
        token_s, step_s = bench.reading_s(min(PROMPT, bench.longest), PREFILL_CHUNK, _STEPS)
        return Trial(value=kv, token_s=token_s, step_s=step_s)
    finally:
        bench.close()
