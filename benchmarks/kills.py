"""Kill builds and batches at random moments, fill their disk, and start two of everything at once: nothing lost or left behind.

    python benchmarks/kills.py [--part builds] [--count 40] [--seed 0] [--out benchmarks/results/kills.json]

A build is onto a bundle that is there; of a batch, the file of requests changes between the kills.
A full disk is a limit of the size of a file (RLIMIT_FSIZE), which lets a write fail halfway as one does. Each runs in a fork.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import mcv_runtime
from mcv_export.build import BuildOptions, build
from mcv_export.families import families
from mcv_runtime import McvError, Options
from mcv_runtime.batch.rows import Defaults
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.command.batch_cli import answer_batch
from mcv_runtime.vision.picture_store import PictureStore

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "models" / "tiny" / "demo.png"
GOLDEN = ROOT / "tests" / "golden" / "minicpmv2_6" / "checkpoint"
QUESTIONS = ["What does the text say?", "What colour is the circle?", "Describe the picture.", "How many shapes are there?"]
ROWS = 40
DONE, REFUSED, FAILED = 0, 2, 9
"""Exit codes of a fork; any other is a crash."""


class Trial:
    """One folder in which things are done to a bundle and a batch, and what was wrong afterwards."""

    def __init__(self, folder: Path, dice: Random) -> None:
        self.wrong: list[str] = []
        self.folder, self.dice = folder, dice
        self.checkpoint = shutil.copytree(GOLDEN, folder / "checkpoint", ignore=shutil.ignore_patterns("*.gz"))
        weights = gzip.decompress((GOLDEN / "model.safetensors.gz").read_bytes())
        (self.checkpoint / "model.safetensors").write_bytes(weights)
        self.bundles, self.batches = folder / "bundles", folder / "batches"
        self.bundles.mkdir()
        self.batches.mkdir()
        self.bundle, self.rows, self.answers = self.bundles / "bundle", self.batches / "rows.jsonl", self.batches / "out.jsonl"

    def build(self, out: Path | None = None, *, force: bool = True) -> None:
        build(self.checkpoint, out or self.bundle, BuildOptions(precision="q8", force=force))

    def answer(self) -> None:
        defaults = Defaults(prompt="", system=None, options=Options(), model="demo")
        with mcv_runtime.load(threads=1) as engine:
            if answer_batch(engine, self.rows, self.answers, defaults, 3):
                raise RuntimeError("a row failed")

    def ask_for(self, count: int) -> list[dict[str, Any]]:
        """Write the requests of a batch."""
        made = [
            {"id": n, "image": str(PICTURE), "prompt": self.dice.choice(QUESTIONS), "max_new_tokens": 3} for n in range(count)
        ]
        self.write_rows(made)
        return made

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def note(self, what: str, *, unless: bool) -> None:
        if not unless:
            self.wrong.append(what)
            print(what, flush=True)

    def check_bundle(self, when: str) -> None:
        try:
            list(Bundle.open(self.bundle).verify())
        except McvError as error:
            self.note(f"{when}: {error}", unless=False)

    def check_answers(self, rows: list[dict[str, Any]], when: str) -> None:
        written = [json.loads(line) for line in self.answers.read_text(encoding="utf-8").splitlines()]
        wanted = [(number, row["id"]) for number, row in enumerate(rows, 1)]
        self.note(
            f"{when}: rows are lost, repeated or out of order", unless=[(one["row"], one["id"]) for one in written] == wanted
        )
        self.note(f"{when}: a row has no answer", unless=all("answer" in one for one in written))

    def check_nothing_left(self, when: str) -> None:
        left = {path.name for folder in (self.bundles, self.batches) for path in folder.iterdir()}
        left -= {"bundle", "rows.jsonl", "out.jsonl"}
        self.note(f"{when}: left behind: {sorted(left)}", unless=not left)


def fork(do: Callable[[], object], file_bytes: int | None = None) -> int:
    """The process id of a fork that does it silently, its files not larger than `file_bytes`."""
    child = os.fork()
    if child:
        return child
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    code = FAILED
    try:
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        do()
        code = DONE
    except McvError:
        code = REFUSED
    finally:
        os._exit(code)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int, after_s: float) -> bool:
    """Whether it was still at work after that time; it is not now."""
    until = time.monotonic() + after_s
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def kill_builds(trial: Trial, kills: int) -> dict[str, Any]:
    began = time.monotonic()
    trial.note("the first build failed", unless=end(fork(trial.build)) == DONE)
    whole, killed, tried = time.monotonic() - began, 0, 0
    while killed < kills:
        tried += 1
        killed += kill(fork(trial.build), trial.dice.uniform(0, 1.05 * whole))
        trial.check_bundle(f"build {tried}")
    trial.note("the last build failed", unless=end(fork(trial.build)) == DONE)
    trial.check_bundle("after all builds")
    trial.check_nothing_left("after all builds")
    return {"killed": killed, "finished before": tried - killed}


def kill_batches(trial: Trial, kills: int) -> dict[str, Any]:
    killed = rounds = 0
    whole = 0.0
    while killed < kills:
        rounds += 1
        trial.answers.unlink(missing_ok=True)
        rows = trial.ask_for(ROWS)
        if not whole:
            began = time.monotonic()
            trial.note("the first batch failed", unless=end(fork(trial.answer)) == DONE)
            whole = time.monotonic() - began
            trial.answers.unlink()
        for turn in range(8):
            if turn == 5:  # now the requests change: some go, one is new, all in another order
                rows = [row for row in rows if row["id"] % 7]
                trial.dice.shuffle(rows)
                rows.insert(
                    3, {"id": 1000 + rounds, "image": str(PICTURE), "prompt": "What shape is this?", "max_new_tokens": 3}
                )
                trial.write_rows(rows)
            killed += kill(fork(trial.answer), trial.dice.uniform(0, 0.9 * whole))
        trial.note(f"round {rounds}: the last batch failed", unless=end(fork(trial.answer)) == DONE)
        trial.check_answers(rows, f"round {rounds}")
        trial.check_nothing_left(f"round {rounds}")
    return {"killed": killed, "rounds": rounds}


def fill_disks(trial: Trial, count: int) -> dict[str, Any]:
    """Files that may not grow beyond a random size: one line, what was there stays, and the next one goes on."""
    ends: dict[str, int] = {}
    trial.note("the first build failed", unless=end(fork(trial.build)) == DONE)
    for number in range(count):
        if number % 2:
            largest = trial.dice.randrange(1, 900_000)
            code = end(fork(trial.build, largest))
            trial.check_bundle(f"a full disk at {largest:,} bytes")
        else:
            trial.answers.unlink(missing_ok=True)
            rows = trial.ask_for(ROWS // 2)
            code = end(fork(trial.answer, trial.dice.randrange(1, 4000)))
            trial.note(f"batch {number} after a full disk", unless=end(fork(trial.answer)) == DONE)
            trial.check_answers(rows, f"batch {number} after a full disk")
        name = {DONE: "done", REFUSED: "one line"}.get(code, f"exit {code}")
        ends[name] = ends.get(name, 0) + 1
        trial.note(f"full disk {number}: exit {code}", unless=code in (DONE, REFUSED))
        trial.check_nothing_left(f"full disk {number}")
    return ends


def start_two(trial: Trial, count: int) -> dict[str, Any]:
    """Two builds, batches, conversations and caches to one place at the same time."""
    fresh, refused = trial.bundles / "fresh", 0
    trial.note("the first build failed", unless=end(fork(trial.build)) == DONE)
    for number in range(count):
        shutil.rmtree(fresh, ignore_errors=True)
        codes = sorted(end(child) for child in [fork(lambda: trial.build(fresh, force=False)) for _ in range(2)])
        trial.note(f"two builds of a new bundle: {codes}", unless=codes == [DONE, REFUSED])
        shutil.rmtree(fresh, ignore_errors=True)
        codes = sorted(end(child) for child in [fork(trial.build) for _ in range(2)])
        trial.note(f"two builds with force: {codes}", unless=codes in ([DONE, DONE], [DONE, REFUSED]))
        trial.check_bundle("two builds with force")
        trial.answers.unlink(missing_ok=True)
        rows = trial.ask_for(ROWS)
        codes = sorted(end(child) for child in [fork(trial.answer) for _ in range(2)])
        refused += codes == [DONE, REFUSED]
        trial.note(f"two batches: {codes}", unless=codes in ([DONE, DONE], [DONE, REFUSED]))
        trial.check_answers(rows, "two batches")
        trial.check_nothing_left(f"two of everything, {number}")
        codes = [end(child) for child in [fork(lambda: _save(trial.folder / "chat.mcv")) for _ in range(2)]]
        trial.note(f"two conversations: {codes}", unless=codes == [DONE, DONE])
        trial.note("a conversation cannot be loaded", unless=end(fork(lambda: _load(trial.folder / "chat.mcv"))) == DONE)
        codes = [end(child) for child in [fork(lambda: _use_cache(trial.folder / "cache")) for _ in range(2)]]
        trial.note(f"two caches: {codes}", unless=codes == [DONE, DONE])
    return {"times": count, "batches of which one was refused": refused}


def _save(path: Path) -> None:
    with mcv_runtime.load(threads=1) as engine:
        chat = engine.chat(max_new_tokens=3)
        chat.ask(PICTURE, QUESTIONS[0])
        for _ in range(5):
            chat.save(path)


def _load(path: Path) -> None:
    with mcv_runtime.load(threads=1) as engine:
        engine.load_chat(path)


def _use_cache(folder: Path) -> None:
    store = PictureStore(folder, 1_000_000)
    for number in range(300):
        key, value = f"{number % 20:064x}", np.full((50 + number % 20, 100), number % 20, np.float32)
        found = store.get(key)
        if found is None:
            store.put(key, value)
        elif not np.array_equal(found, value):
            raise AssertionError("another picture's values")
    if sum(path.stat().st_size for path in folder.iterdir()) > 1_200_000:
        raise AssertionError("more than the cache's limit")


PARTS: dict[str, tuple[Callable[[Trial, int], dict[str, Any]], int]] = {
    "batches": (kill_batches, 160),
    "builds": (kill_builds, 40),
    "full_disk": (fill_disks, 50),
    "two_at_once": (start_two, 10),
}
"""What is done, and how often."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="This alone; the others stay in --out as they are.")
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    families()  # so that forks need not import them
    assert threading.active_count() == 1
    wrong = False
    for part in [wanted.part] if wanted.part else PARTS:
        do, count = PARTS[part]
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["MCV_CACHE"] = str(Path(scratch) / "cache-of-checks")
            trial, began = Trial(Path(scratch), Random(wanted.seed)), time.monotonic()
            said = {"seed": wanted.seed, **do(trial, wanted.count or count), "wrong": trial.wrong}
            said["seconds"] = round(time.monotonic() - began)
        print(part, json.dumps(said), flush=True)
        wrong = wrong or bool(trial.wrong)
        if wanted.out is not None:
            known = json.loads(wanted.out.read_text(encoding="utf-8")) if wanted.out.exists() else {}
            known = {name: said if name == part else known.get(name) for name in PARTS if name == part or name in known}
            wanted.out.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
