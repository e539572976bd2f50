"""Kill a batch from table to table at random moments, and see that no row is lost, repeated or damaged.

    python benchmarks/table_kills.py benchmarks/results/table-kills.json [--rows 100000] [--kills 50] [--seed 0]

`mcv-run --batch` with models/tiny in a process of its own, over few small pictures, each of which is encoded once a start.
It is killed after so many more rows as chance has it; at the start, while earlier rows are passed over; while the table is
made of the lines; and while the lines of a finished table are made again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from full_size import _cpu
from PIL import Image
from pyarrow import parquet

import mcv_runtime

PICTURES = 8
SIDE = 28
_WITHIN_S = {"start": 4.0, "rows": 0.05, "table": 1.5, "unpacking": 3.0}
"""A kill comes so long at most after what it waits for: the start, so many rows, the writing of the table or of its lines."""
QUESTIONS = ["What does the text say?", "What colour is it?", "Describe the picture."]
OPTIONS = {"max_new_tokens": 1, "max_slice_nums": 1}
_FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
_AT_START, _AT_TABLE, _AT_UNPACKING = 0.1, 0.1, 0.1
"""Shares of the kills that are not while rows are answered; one at the start may come before anything is done."""


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number * 30, 255 - number * 30, 100)).save(buffer, "PNG")
    return buffer.getvalue()


def asked(row: int) -> tuple[int | None, str]:
    """Picture and question of a row, from 0; one in ten has a picture, so that many rows are cheap."""
    return None if row % 10 else row // 10 % PICTURES, QUESTIONS[row % len(QUESTIONS)]


class Trial:
    """A folder with a table of requests, runs that are killed there, and what was wrong."""

    def __init__(self, folder: Path, rows: int, dice: Random) -> None:
        self.rows, self.dice = rows, dice
        self.wrong: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self.line_bytes = 300.0
        """On the average."""
        self.folder, self.table, self.out = folder, folder / "rows.parquet", folder / "answers.parquet"
        self.lines, self.partial = folder / "answers.parquet.rows", folder / "answers.parquet.partial"
        seen = {None: None, **{number: picture(number) for number in range(PICTURES)}}
        images, prompts = zip(*((seen[shown], question) for shown, question in map(asked, range(rows))), strict=True)
        columns = {"id": [f"row {row}" for row in range(rows)], "image": images, "prompt": prompts}
        parquet.write_table(pa.table(columns), self.table, row_group_size=1000)
        self.known = (0, hashlib.sha256())
        """Bytes of whole lines at the last kill, and their digest: they stay as they are."""

    def start(self) -> subprocess.Popen[str]:
        command = ["--batch", str(self.table), "--out", str(self.out), *_FLAGS, "--threads", "1", "--batch-size", "16"]
        return subprocess.Popen([sys.executable, "-m", "mcv_runtime.command.cli", *command], stderr=subprocess.PIPE, text=True)

    def note(self, what: str) -> None:
        self.wrong.append(what)
        print(what, flush=True)

    def killed(self, kind: str, of: int = 1) -> bool:
        """Start the batch and kill it, as one of so many times; whether it was still at work then."""
        begun, start = time.time_ns(), time.monotonic()
        step = (self.rows * self.line_bytes - self.size()) / (of + 1)
        size = self.size() + int(self.dice.uniform(0, 2) * step)
        delay = self.dice.uniform(0, _WITHIN_S[kind])
        process, memory = self.start(), dict[str, int]()
        while process.poll() is None and not self._is_due(kind, size, begun):
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is None:
            memory = _memory(process.pid)
        process.kill()
        said = process.communicate()[1]
        was_at_work = process.returncode == -9
        if not was_at_work and process.returncode:
            self.note(f"exit {process.returncode}: {said[-500:]}")
        lines = self.check_lines()
        self.runs.append({"kind": kind, "lines": lines, "seconds": round(time.monotonic() - start, 1), **memory})
        print(f"{len(self.runs)}: {json.dumps(self.runs[-1])}", flush=True)
        return was_at_work

    def _is_due(self, kind: str, size: int, begun: int) -> bool:
        if kind in ("start", "rows"):
            return kind == "start" or self.size() > size
        watched = self.partial if kind == "table" else self.lines.with_name(f"{self.lines.name}.partial")
        return watched.exists() and watched.stat().st_ctime_ns > begun  # not that of an earlier start

    def size(self) -> int:
        return self.lines.stat().st_size if self.lines.exists() else 0

    def check_lines(self) -> int:
        """How many answers are there: those of the first rows, and the ones that were there before are unchanged."""
        if not self.lines.exists():
            return 0
        count, size, digest = 0, 0, hashlib.sha256()
        before, old = self.known
        with self.lines.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                count += 1
                size += len(line)
                digest.update(line)
                if size == before and old.digest() != digest.digest():
                    self.note("lines that were there have changed")
                if not line.startswith(b'{"row": %d, "id": "row %d"' % (count, count - 1)):
                    self.note(f"line {count} is {line[:60]!r}")
                    break
        if size < before:
            self.note(f"{before - size:,} bytes of finished lines are gone")
        self.known = (size, digest)
        return count

    def finish(self) -> dict[str, int]:
        """The last start, which is left alone; its memory."""
        process, memory = self.start(), dict[str, int]()
        while process.poll() is None:
            memory = _memory(process.pid) or memory
            time.sleep(0.02)
        if process.returncode:
            self.note(f"the last start ended with {process.returncode}: {process.communicate()[1][-500:]}")
        return memory

    def check_table(self) -> None:
        """The finished table: a row for every row, each with the answer that an engine gives to it alone."""
        wanted = {}
        with mcv_runtime.load(threads=1) as engine:
            for shown, question in {asked(row) for row in range(self.rows)}:
                wanted[shown, question] = engine.ask(None if shown is None else picture(shown), question, **OPTIONS).text
        found = parquet.read_table(self.out, columns=["row", "id", "answer", "error"]).to_pylist()
        if len(found) != self.rows:
            self.note(f"{len(found):,} rows of {self.rows:,}")
        for row, one in enumerate(found):
            if one != {"row": row + 1, "id": f"row {row}", "answer": wanted[asked(row)], "error": None}:
                self.note(f"row {row + 1} is {one}")
                break
        left = {path.name for path in self.folder.iterdir()} - {self.table.name, self.out.name}
        if left:
            self.note(f"left behind: {sorted(left)}")


def _memory(pid: int) -> dict[str, int]:
    """Megabytes of a process: now, and the most that it had."""
    try:
        said = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {name: round(int(said[key].split()[0]) / 1024) for name, key in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))}
    except (OSError, KeyError):
        return {}


def kill_all(trial: Trial, kills: int) -> dict[str, int]:
    """How many kills of each kind met the batch at work."""
    counted = dict.fromkeys(_WITHIN_S, 0)
    wanted = {"start": round(kills * _AT_START), "table": round(kills * _AT_TABLE), "unpacking": round(kills * _AT_UNPACKING)}
    wanted["rows"] = kills - sum(wanted.values())
    kinds = ["start"] * wanted["start"] + ["rows"] * wanted["rows"]
    trial.dice.shuffle(kinds)
    for number, kind in enumerate(kinds):
        counted[kind] += trial.killed(kind, kinds[number:].count("rows"))
        if trial.runs[-1]["lines"]:
            trial.line_bytes = trial.size() / trial.runs[-1]["lines"]
    for kind in ("table", "unpacking"):
        while counted[kind] < wanted[kind]:
            if kind == "unpacking" and (trial.lines.exists() or not trial.out.exists()):
                trial.finish()
            counted[kind] += trial.killed(kind)
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MCV_CACHE"] = str(Path(scratch) / "cache-of-checks")
        work = Path(scratch) / "batch"
        work.mkdir()
        begun, trial = time.monotonic(), Trial(work, given.rows, Random(given.seed))
        killed = kill_all(trial, given.kills)
        last = trial.finish()
        trial.check_table()
    peaks = [run["peak_mb"] for run in trial.runs if run.get("lines") and "peak_mb" in run]
    half = len(peaks) // 2
    result = {
        "cpu": _cpu(),
        "rows": given.rows,
        "seed": given.seed,
        "killed": killed,
        "wrong": trial.wrong,
        "seconds": round(time.monotonic() - begun),
        "peak_mb_median": {"first half of the kills": _median(peaks[:half]), "second half": _median(peaks[half:])},
        "last_start": last,
        "runs": trial.runs,
    }
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}))
    return 1 if trial.wrong else 0


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2] if values else 0


if __name__ == "__main__":
    sys.exit(main())
