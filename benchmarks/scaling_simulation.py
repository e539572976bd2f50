"""What a server or a batch would take, simulated from measured costs, and checked against a server that was measured.

python benchmarks/scaling_simulation.py benchmarks/results/scaling-costs-NAME.json benchmarks/results/scaling-NAME.json
    [--load benchmarks/results/load-NAME.json] [--limits LIMITS_OF_THIS_BOX.json]

The engine is one process of the simulation that takes the scheduler's turns: a token for every row, then one long thing, for
the oldest and for who has least left in turns, pieces of a prompt by time. Every turn takes what the measured costs say. With
`--load` (from `load.py`), clients ask as they did there: what a server takes besides for a step is in the costs, what it takes
for a request (HTTP, opening its picture) is what the run of one client had left, and more clients are predictions. Then
machines and work that are not here: computing by products of 8-bit integers, steps by the memory that they read. Needs simpy.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simpy

from mcv_runtime.decoding.prompt_pace import PromptPace
from mcv_runtime.engine import MAX_ROWS
from mcv_runtime.request.options import PREFILL_CHUNK

SEED = 0


class Machine(NamedTuple):
    """Other hardware: what a program may reach there, taken as half of the peak of its products and 0.8 of its memory's."""

    name: str
    processes: int
    int8_gops: float
    """Of each process."""
    read_gb_per_s: float
    """Of each process."""
    price_per_h: float
    """US dollars for all of it; 0: nobody rents it out."""


MACHINES = (
    Machine("phone: 4 large ARM cores with 8-bit dot products at 3 GHz, LPDDR5-6400", 1, 770, 41, 0.0),
    Machine("server: 64 cores with VNNI at 2.6 GHz, 8 channels of DDR5-4800; 8 processes of 8 threads", 8, 2660, 30, 3.3),
    Machine("100 boxes of 8 cores with VNNI at 3.7 GHz, 2 channels of DDR5-5200 each; a process a box", 100, 3790, 66, 41.0),
)


class Costs:
    """Seconds that turns take, by what was measured; `slower` and `memory_slower` for machines other than the measured one."""

    def __init__(self, measured: dict[str, Any], slower: float = 1.0, memory_slower: float = 1.0) -> None:
        self.step_besides = 0.0
        fits = measured["fits"]
        self._slices = [one * slower for one in fits["slices"]["factors"]]
        self._prompt = [one * slower for one in fits["prompt"]["factors"]]
        self._context = fits["step"]["factors"][2] * memory_slower
        points = sorted((one["rows"], one) for one in measured["points"]["step"] if one["context"] < 128)
        self._rows = [rows for rows, _ in points]
        alone = points[0][1]["seconds"]
        # A row more computes; the first one waits for the weights.
        self._steps = [
            alone * memory_slower
            + (one["seconds"] - alone) * slower
            - fits["step"]["factors"][2] * rows * one["context"] * memory_slower
            for rows, one in points
        ]

    def encode(self, slices: int) -> float:
        return float(self._slices[0] + self._slices[1] * slices)

    def read(self, start: int, tokens: int) -> float:
        fixed, each, squared = self._prompt
        return float(fixed + each * tokens + squared * ((start + tokens) ** 2 - start**2) / 2)

    def step(self, contexts: list[int]) -> float:
        weights = float(np.interp(len(contexts), self._rows, self._steps))
        return weights + self._context * sum(contexts) + self.step_besides


@dataclass
class Asked:
    """One request: what is left of it."""

    slices: int
    prompt: int
    known: int
    """Tokens of the prompt that need not be read."""
    tokens: int
    arrived: float
    over: simpy.Event
    besides: float = 0.0
    read: int = field(init=False)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.read = self.known

    @property
    def decoding(self) -> bool:
        return self.read == self.prompt


class Engine:
    """The scheduler's turns."""

    def __init__(self, env: simpy.Environment, costs: Costs) -> None:
        self.env, self.costs, self._pace = env, costs, PromptPace()
        self._waiting: deque[Asked] = deque()
        self._active: list[Asked] = []
        self._come = env.event()
        self.spent = {"besides": 0.0, "slices": 0.0, "prompt": 0.0, "steps": 0.0}
        env.process(self._run())

    def submit(self, asked: Asked) -> None:
        self._waiting.append(asked)
        if not self._come.triggered:
            self._come.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        long_is_due, oldest_is_due = False, True
        while True:
            while self._waiting and len(self._active) < MAX_ROWS:
                self._active.append(self._waiting.popleft())
            if not self._active:
                self._come = self.env.event()
                yield self._come
                continue
            running = [one for one in self._active if one.decoding]
            reading = [one for one in self._active if not one.decoding]
            if running and not (long_is_due and reading):
                long_is_due = True
                yield self._spend("steps", self.costs.step([one.prompt + len(one.times) for one in running]))
                for one in running:
                    self._token(one)
                continue
            long_is_due = False
            if not oldest_is_due:
                reading.sort(key=self._left)
            oldest_is_due = not oldest_is_due
            yield self._long(reading[0], beside=bool(running))

    def _left(self, one: Asked) -> float:
        return one.slices * self.costs.encode(1) + (one.prompt - one.read) * (self._pace.token_s or 0)

    def _long(self, one: Asked, *, beside: bool) -> simpy.Event:
        if one.besides:
            seconds, one.besides = one.besides, 0.0
            return self._spend("besides", seconds)
        if one.slices:
            count = 1 if beside else one.slices
            one.slices -= count
            return self._spend("slices", self.costs.encode(count))
        count = min(self._pace.tokens(PREFILL_CHUNK, beside=beside), one.prompt - one.read)
        seconds = self.costs.read(one.read, count)
        self._pace.note(count, seconds)
        event = self._spend("prompt", seconds)
        one.read += count
        if one.decoding:
            event.callbacks.append(lambda _: self._token(one))
        return event

    def _spend(self, on: str, seconds: float) -> simpy.Timeout:
        self.spent[on] += seconds
        return self.env.timeout(seconds)

    def _token(self, one: Asked) -> None:
        one.times.append(self.env.now)
        if len(one.times) == one.tokens:
            self._active.remove(one)
            one.over.succeed()


@dataclass
class Work:
    """What clients ask, one question after the other; the first about every picture has its slices to encode."""

    slices: int
    prompt: int
    """Tokens of a prompt about a new picture."""
    prompt_again: int
    known_again: int
    questions: int
    """About each picture."""
    lengths: dict[str, int]
    """Tokens of answers, and how many were so long; one is drawn for each."""

    @property
    def longest(self) -> int:
        return max(map(int, self.lengths))


def simulate(costs: Costs, work: Work, clients: int, seconds: float, besides: float = 0.0) -> dict[str, Any]:
    """So many clients, each of which asks its next question when it has the answer."""
    env, draw = simpy.Environment(), random.Random(SEED)
    engine, done = Engine(env, costs), []
    lengths, weights = [int(tokens) for tokens in work.lengths], list(work.lengths.values())

    def client() -> Generator[simpy.Event, Any, None]:
        while True:
            for number in range(work.questions):
                if env.now >= seconds:
                    return
                new = number == 0
                asked = Asked(
                    slices=work.slices if new else 0,
                    prompt=work.prompt if new else work.prompt_again,
                    known=0 if new else work.known_again,
                    tokens=draw.choices(lengths, weights)[0],
                    arrived=env.now,
                    over=env.event(),
                    besides=besides,
                )
                engine.submit(asked)
                yield asked.over
                done.append((new, asked))

    env.run(env.all_of([env.process(client()) for _ in range(clients)]))
    total = sum(engine.spent.values())
    return {
        "clients": clients,
        "answers_per_s": len(done) / env.now,
        "tokens_per_s": sum(one.tokens for _, one in done) / env.now,
        "first_token_ms": _percentiles([one.times[0] - one.arrived for new, one in done if new]),
        "first_token_known_picture_ms": _percentiles([one.times[0] - one.arrived for new, one in done if not new]),
        "between_tokens_ms": _percentiles([float(gap) for _, one in done for gap in np.diff(one.times)]),
        "answer_ms": _percentiles([one.times[-1] - one.arrived for new, one in done if new]),
        "answer_known_picture_ms": _percentiles([one.times[-1] - one.arrived for new, one in done if not new]),
        "share_of_time": {name: round(spent / total, 3) for name, spent in engine.spent.items()},
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)) * 1e3, 2) for p in (50, 95, 99)} if values else {}


def checked(measured: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """The same clients as there, and how far from it the simulation is."""
    costs, alone = Costs(measured), loaded["runs"][0]
    assert alone["clients"] == 1, "the first run of the load must be one client's"
    work = Work(**alone["work"])
    costs.step_besides = max(measured["served"]["step_ms"]["p50"] / 1e3 - costs.step([work.prompt + work.longest // 2]), 0.0)
    simulated = simulate(costs, work, 1, alone["seconds"])
    besides = max(1 / alone["answers_per_s"] - 1 / simulated["answers_per_s"], 0.0)
    found: dict[str, Any] = {"step_besides_s": round(costs.step_besides, 5), "request_besides_s": round(besides, 4), "runs": []}
    for run in loaded["runs"]:
        simulated = simulate(costs, Work(**run["work"]), run["clients"], run["seconds"], besides)
        off = {"answers_per_s": simulated["answers_per_s"] / run["answers_per_s"] - 1}
        for name in ("answer_ms", "answer_known_picture_ms"):  # when there is text to see, random weights make another matter
            off |= {f"{name} {p}": simulated[name][p] / run[name][p] - 1 for p in ("p50", "p95")}
        found["runs"].append({**_rounded(simulated), "off": {name: round(one, 3) for name, one in off.items()}})
    return found


def elsewhere(measured: dict[str, Any], limits: dict[str, float]) -> list[dict[str, Any]]:
    """Pages a day of other machines: a picture of ten slices, and an answer as long as a page of text."""
    page = Work(
        slices=10, prompt=10 * 64 + 40, prompt_again=0, known_again=0, questions=1, lengths={"400": 1, "500": 1, "600": 1}
    )
    found = []
    for machine in (Machine("here", 1, limits["int8_gops"], limits["read_gb_per_s"], 0.0), *MACHINES):
        costs = Costs(measured, limits["int8_gops"] / machine.int8_gops, limits["read_gb_per_s"] / machine.read_gb_per_s)
        one, full = simulate(costs, page, 1, 4 * 3600), simulate(costs, page, MAX_ROWS, 8 * 3600)
        a_day = 86_400 * machine.processes * full["answers_per_s"]
        found.append(
            {
                "machine": machine.name,
                "page_alone_s": round(1 / one["answers_per_s"], 2),
                "pages_a_day": round(a_day),
                "dollars_per_1000_pages": round(24_000 * machine.price_per_h / a_day, 3),
                "share_of_time_alone": one["share_of_time"],
                "share_of_time_full": full["share_of_time"],
            }
        )
    return found


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    return {name: round(one, 4) if isinstance(one, float) else one for name, one in result.items()}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--load", type=Path, help="A result of load.py for the same bundle on the same machine.")
    parser.add_argument("--limits", type=Path, help="What peers/limits.py says here.")
    given = parser.parse_args()
    measured = _read(given.costs)
    result: dict[str, Any] = {"bundle": measured["bundle"], "machine": measured["machine"], "seed": SEED}
    if given.load is not None:
        result["against_measured"] = checked(measured, _read(given.load))
    if given.limits is not None:
        result["limits_here"] = _read(given.limits)
        result["elsewhere"] = elsewhere(measured, result["limits_here"])
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
