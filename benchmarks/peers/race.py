"""Race this project against other runtimes on the same cores: one command makes what is needed, measures in turns, writes JSON.

    python benchmarks/peers/race.py --shape minicpmv4_6 --out benchmarks/results/peers-minicpmv4_6.json
    python benchmarks/peers/race.py --shape minicpmv4_0 --out benchmarks/results/peers-minicpmv4_0.json --rounds 3

Full-size random weights (`--checkpoint`, or made). Each peer works in an environment of its own, made and kept in `--cache`
with its files; what cannot be made is named in the result with its reason, and the others go on. In each round every peer is
measured once, the order reversed from round to round, all other processes held still. Then each peer answers in a fresh
process. The result is written as it comes: the same command again does the rounds that are missing. A ratio is a peer's time by
ours in the same round: above 1, we are faster. Speed only: random weights say nothing of quality.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chart import draw
from contestants import CONTESTANTS, OURS, Contestant
from environments import ENVIRONMENTS, PeerEnvironmentError, python_of
from PIL import Image
from worker import FOLDER, Worker, WorkerError, run_once

SLOW_S = 60
"""Who takes longer for a measure once is not asked for it again."""
SPARE_BYTES = 1 << 30


class Race:
    """What is raced, and the result so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.start = arguments, time.monotonic()
        self.cache: Path = arguments.cache
        self.folder = self.cache / (arguments.shape or arguments.checkpoint.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint: Path = arguments.checkpoint or self.folder / "checkpoint"
        self.slow: set[tuple[str, str]] = set()
        self.taking_part = [one for one in CONTESTANTS if not arguments.only or one.name in arguments.only]
        self.result: dict[str, Any] = {
            "checkpoint": f"{self.folder.name}, random weights",
            "machine": machine(arguments),
            "versions": {name: list(environment.requirements) for name, environment in ENVIRONMENTS.items()}
            | {"mcv": [f"{name}=={importlib.metadata.version(name)}" for name in ("minicpmv-onnx", "onnxruntime", "torch")]},
            "limits": {},
            "left_out": {},
            "summary": {},
            "load_s": {},
            "samples": {},
        }
        if arguments.out.exists():
            before = json.loads(arguments.out.read_text(encoding="utf-8"))
            if before["checkpoint"] != self.result["checkpoint"] or before["machine"] != self.result["machine"]:
                raise SystemExit(f"{arguments.out} is of another shape, machine or note; choose another --out")
            self.result |= {key: before[key] for key in ("limits", "samples")}

    def command(self, one: Contestant, verb: str, picture: Path | None = None) -> list[str]:
        settings = {
            "checkpoint": str(self.checkpoint),
            "folder": str(self.folder / one.folder),
            "variant": one.variant,
            "provider": one.provider,
            "threads": self.arguments.threads,
            "picture": None if picture is None else str(picture),
        }
        return [str(python_of(one.environment, self.cache)), str(FOLDER / one.worker), verb, json.dumps(settings)]

    def log(self, one: Contestant) -> Path:
        return self.folder / f"{one.name.replace(' ', '-')}.log"

    def leave_out(self, one: Contestant, reason: object) -> None:
        say(f"{one.name} is left out: {reason}")
        self.result["left_out"][one.name] = self.told(reason)
        self.taking_part = [other for other in self.taking_part if other is not one]
        self.write()

    def told(self, reason: object) -> str:
        """A reason that is kept: files by their names in the cache, not by where that lies on this machine."""
        return str(reason).replace(f"{self.cache}{os.sep}", "")

    def prepare(self) -> None:
        """Environments and files, those that are not there yet."""
        if not (self.checkpoint / "config.json").exists():
            say(f"making {self.checkpoint}")
            script = FOLDER.parent / "random_checkpoint.py"
            subprocess.run([sys.executable, str(script), self.arguments.shape, str(self.checkpoint)], check=True)
        for one in list(self.taking_part):
            say(f"preparing {one.name}")
            (self.folder / one.folder).mkdir(exist_ok=True)
            try:
                run_once(self.command(one, "prepare"), self.log(one))
            except (PeerEnvironmentError, WorkerError) as error:
                self.leave_out(one, error)

    def rounds(self) -> None:
        """All peers loaded side by side, each measured once a round."""
        self.result["limits"] = self.result["limits"] or limits(self.arguments.threads)
        workers: dict[str, Worker] = {}
        try:
            for one in list(self.taking_part):
                if (free := free_memory()) < loaded_bytes(self.folder / one.folder, one.loads) + SPARE_BYTES:
                    self.leave_out(one, f"{free >> 20:,} MB of free memory are too few beside the others")
                    continue
                say(f"loading {one.name}")
                try:
                    workers[one.name] = Worker(self.command(one, "serve"), self.log(one))
                    self.result["load_s"][one.name] = round(workers[one.name].load_s, 2)
                except WorkerError as error:
                    self.leave_out(one, error)
            longest = 0.0
            for number in range(self.arguments.rounds):
                if self.left_s() < longest + self.arguments.cold_minutes * 60:
                    say("the minutes are over: the rounds end here")
                    break
                begun = time.monotonic()
                for one in self.taking_part[:: -1 if number % 2 else 1]:
                    self.measure(one, workers[one.name], number)
                longest = max(longest, time.monotonic() - begun)
        finally:
            for worker in workers.values():
                worker.close()

    def measure(self, one: Contestant, worker: Worker, number: int) -> None:
        for measure in ("text", "vision"):
            samples = self.samples(one, measure)
            if measure not in one.measures or len(samples) > number or (one.name, measure) in self.slow:
                continue
            begun = time.monotonic()
            try:
                samples.append({name: round(value, 4) for name, value in worker.ask(measure).items()})
            except WorkerError as error:
                self.leave_out(one, error)
                return
            if time.monotonic() - begun > SLOW_S:
                self.slow.add((one.name, measure))
            say(f"round {number + 1}, {one.name}: {samples[-1]}")
            self.write()

    def cold(self) -> None:
        """A fresh process for each answer, with a picture and without; files are in the page cache."""
        side = self.arguments.picture_side
        picture = self.folder / f"{side}.png"
        Image.effect_mandelbrot((side, side), (-2.5, -1.5, 1.0, 1.5), 100).convert("RGB").save(picture)
        for number in range(self.arguments.cold_rounds):
            for one in self.taking_part[:: -1 if number % 2 else 1]:
                for measure in ("cold text", "cold picture"):
                    samples = self.samples(one, measure)
                    if measure not in one.measures or len(samples) > number or (number and self.left_s() < 0):
                        continue
                    try:
                        took, memory = run_once(
                            self.command(one, "cold", picture if measure == "cold picture" else None), self.log(one)
                        )
                    except WorkerError as error:
                        say(f"{one.name}, {measure}: {error}")
                        self.result["left_out"][f"{one.name}, {measure}"] = self.told(error)
                        continue
                    samples.append({"first_token": round(took, 3), "peak_rss_mb": round(memory)})
                    say(f"{measure} {number + 1}, {one.name}: {samples[-1]}")
                    self.write()

    def samples(self, one: Contestant, measure: str) -> list[dict[str, float]]:
        found: list[dict[str, float]] = self.result["samples"].setdefault(one.name, {}).setdefault(measure, [])
        return found

    def left_s(self) -> float:
        return float(self.arguments.minutes * 60 - (time.monotonic() - self.start))

    def write(self) -> None:
        self.result["summary"] = summary(self.result["samples"])
        out: Path = self.arguments.out
        part = out.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        part.replace(out)
        out.with_suffix(".svg").write_text(draw(self.result), encoding="utf-8")


def summary(samples: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By measure and peer: the median, and its ratio to ours of the same rounds as [median, least, most]."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, measures in samples.items():
        for measure, rows in measures.items():
            for key in rows[0] if rows else ():
                values = [row[key] for row in rows]
                entry: dict[str, Any] = {"median": round(statistics.median(values), 4), "rounds": len(values)}
                ours = [row[key] for row in samples.get(OURS, {}).get(measure, [])]
                if name != OURS and ours:
                    ratios = [theirs / own for theirs, own in zip(values, ours, strict=False)]
                    entry["ratio"] = [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]
                label = f"{measure}: {key}" if measure.startswith("cold") else key
                found.setdefault(label, {})[name] = entry
    return found


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family')}.{fields.get('model')}",
        "has": [flag for flag in wanted if flag in fields.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "note": arguments.note,
    }


def limits(threads: int) -> dict[str, Any]:
    say("measuring what the machine can do")
    done = subprocess.run([sys.executable, str(FOLDER / "limits.py"), str(threads)], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def free_memory() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def loaded_bytes(folder: Path, loads: str) -> int:
    """Bytes of the files of a peer that it loads; what it maps, or makes, is none of them."""
    files = [path for path in folder.rglob("*") if path.is_file() and loads and loads in str(path.relative_to(folder))]
    return sum(path.stat().st_size for path in files)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    rows = []
    for label, peers in result["summary"].items():
        rows.append(label)
        for name, entry in peers.items():
            ratio = "{} [{}..{}]".format(*entry["ratio"]) if "ratio" in entry else ""
            rows.append(f"  {name:<28}{entry['median']:>10}  {ratio}")
    rows += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="A layout of benchmarks/layouts, which names the files in the cache.")
    parser.add_argument("--checkpoint", type=Path, help="A checkpoint that is there; else one of the shape is made.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("MCV_PEERS", Path.home() / ".cache" / "mcv-peers")))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=12, help="For all measuring; what is missing is for the next time.")
    parser.add_argument("--cold-minutes", type=float, default=4, help="Of these, what is kept for answers of fresh processes.")
    parser.add_argument("--picture-side", type=int, default=1344, help="Pixels: 1344 x 1344 are 10 slices.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[one.name for one in CONTESTANTS])
    parser.add_argument("--prepare", action="store_true", help="Make environments and files, and end.")
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    arguments = parser.parse_args()
    if not (arguments.shape or arguments.checkpoint):
        parser.error("say --shape or --checkpoint")
    race = Race(arguments)
    race.prepare()
    if not arguments.prepare:
        race.start = time.monotonic()
        race.rounds()
        race.cold()
        race.write()
        print(table(race.result))


if __name__ == "__main__":
    main()
