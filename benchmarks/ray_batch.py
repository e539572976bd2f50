"""A batch by workers of Ray that are killed, and its driver too, against the same batch in one process.

    python benchmarks/ray_batch.py benchmarks/results/ray-batch.json [--pictures 2000] [--workers 2] [--seed 0]

`mcv-run --batch` with models/tiny over pictures that are all different: first in one process; then by a cluster on this machine
that nothing happens to; and by one whose workers are killed (SIGKILL) at three random moments, and whose driver once, after
which the same command goes on. All must give the same rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from full_size import _cpu
from load import drawn

QUESTIONS = ["What does the text say?", "Describe the picture."]
SIZE = 8
WORKER_KILLS = 3


class Run:
    """`mcv-run --batch` in a process of its own."""

    def __init__(self, folder: Path, name: str, *more: str) -> None:
        self.out = folder / name
        self.log = folder / f"{name}.log"
        given = ["--batch", str(folder / "rows.jsonl"), "--out", str(self.out), "--batch-size", str(SIZE), "--threads", "1"]
        self.command = [sys.executable, "-m", "mcv_runtime.command.cli", *given, *more]
        self.seconds = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stderr=log)

    def whole(self) -> None:
        begun = time.monotonic()
        if code := self.start().wait():
            raise RuntimeError(f"exit {code}: {self.log.read_text()}")
        self.seconds = time.monotonic() - begun

    def written(self) -> int:
        return self.out.read_bytes().count(b"\n") if self.out.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        """Without what differs from run to run."""
        return [{**json.loads(line), "timings": None} for line in self.out.read_text(encoding="utf-8").splitlines()]


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, level = [], [pid]
    while level:
        level = [child for one in level for child in children.get(one, ())]
        found += level
    return found


def workers(pid: int) -> list[int]:
    """Processes of Ray that have an engine."""
    found = []
    for one in descendants(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{one}/cmdline").read_bytes().startswith(b"ray::_Worker"):
                found.append(one)
    return found


def killed(run: Run, rows: int, dice: Random) -> dict[str, Any]:
    """Kill workers and the driver after random numbers of rows, and let it go on."""
    events = sorted((dice.randrange(rows // 10, rows * 9 // 10), what) for what in ["worker"] * WORKER_KILLS + ["driver"])
    done: list[dict[str, Any]] = []
    begun, process = time.monotonic(), run.start()
    for at, what in events:
        while process.poll() is None and run.written() < at:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        if what == "worker":
            one = dice.choice(workers(process.pid))
            os.kill(one, signal.SIGKILL)
        else:
            process.kill()
            process.wait()
            process = run.start()
        done.append({"after rows": run.written(), "killed": what})
    code = process.wait()
    run.seconds = time.monotonic() - begun
    return {"kills": done, "exit_code": code}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked = [
            {"id": at, "image": f"{at}.png", "prompt": QUESTIONS[at % 2], "max_new_tokens": 8} for at in range(given.pictures)
        ]
        for at in range(given.pictures):
            (folder / f"{at}.png").write_bytes(drawn(at))
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
        cluster = ("--engine", "ray", "--workers", str(given.workers))
        alone, calm, hit = Run(folder, "alone"), Run(folder, "calm", *cluster), Run(folder, "hit", *cluster)
        alone.whole()
        calm.whole()
        happened = killed(hit, given.pictures, Random(given.seed))
        wanted = alone.rows()
        result = {
            "cpu": _cpu(),
            "load_average_at_end": os.getloadavg(),
            "pictures": given.pictures,
            "workers": given.workers,
            "seconds": {"one process": alone.seconds, "ray": calm.seconds, "ray, with kills": hit.seconds},
            "ms_a_row_more_than_one_process": (calm.seconds - alone.seconds) / given.pictures * 1e3,
            "ratio": calm.seconds / alone.seconds,
            "same_answers": {"ray": calm.rows() == wanted, "ray, with kills": hit.rows() == wanted},
            "rows_in_order": [one["id"] for one in hit.rows()] == list(range(given.pictures)),
            **happened,
        }
    given.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if all(result["same_answers"].values()) and result["rows_in_order"] else 1


if __name__ == "__main__":
    sys.exit(main())
