"""Read files as strangers might make them: each ends in an answer or in one line, soon and within memory.

    python benchmarks/hostile_files.py [--seed 0] [--share 1.0] [--kind pictures --count 5000] [--out FILE]

Without --kind all kinds, in the numbers below times --share. Each file is read in a process of its own, so that what crashes
or hangs or takes too much memory is seen; what is found is named by its seed and number, and `--only` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from hostile.guarded import Draw, run

KINDS = {
    "manifests": ("bundles", 3000),
    "graphs": ("bundles", 500),
    "tokenizers": ("bundles", 500),
    "checkpoints": ("checkpoints", 1000),
    "pictures": ("media", 5000),
    "videos": ("media", 500),
    "documents": ("documents", 3000),
    "tables": ("documents", 2000),
    "chats": ("kept", 300),
    "cache_entries": ("kept", 500),
    "rows": ("kept", 300),
}
"""The module that draws a kind, imported when it is wanted: a fork of a small process is quicker; and how many there are."""
SLOW_S = 5.0
"""Of a processor; more is a hang, whatever else the machine does."""
MEMORY_GB = {"graphs": 6.0, "checkpoints": 8.0}
"""Address space; 4 where nothing else is said."""


def attempt(kind: str, numbers: list[int], seed: int, limit_s: float) -> dict[str, Any]:
    """Draw and read the files of these numbers; how they ended, and what should not have been."""
    endings: collections.Counter[str] = collections.Counter()
    wrong = []
    most_memory, most_time = 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        draw: Draw = getattr(importlib.import_module(f"hostile.{KINDS[kind][0]}"), kind)(Path(scratch))
        with suppress(KeyboardInterrupt):  # what was read until then
            for number in numbers:
                case = draw(Random(f"{seed} {kind} {number}"))
                outcome = run(case.read, limit_s=limit_s, memory_gb=MEMORY_GB.get(kind, 4.0))
                ending = "slow" if outcome.cpu_s > SLOW_S and outcome.ending in ("done", "refused") else outcome.ending
                endings[ending] += 1
                most_memory, most_time = max(most_memory, outcome.memory_mb), max(most_time, outcome.cpu_s)
                if ending not in ("done", "refused"):
                    found = {"kind": kind, "seed": seed, "number": number, "what": case.what, "ending": ending}
                    wrong.append(found | {"said": outcome.said, "where": outcome.where, "cpu_s": outcome.cpu_s})
                    print(json.dumps(wrong[-1]), flush=True)
    return {"endings": dict(endings), "most_memory_mb": most_memory, "longest_cpu_s": most_time, "wrong": wrong}


def merged(paths: list[Path]) -> dict[str, Any]:
    """The results of several runs, of other kinds or other seeds, as one."""
    kinds: dict[str, dict[str, Any]] = {}
    seeds: set[int] = set()
    for path in paths:
        said = json.loads(path.read_text(encoding="utf-8"))
        seeds |= {said["seed"]} if "seed" in said else set(said["seeds"])
        for kind, found in said["kinds"].items():
            known = kinds.setdefault(kind, {"endings": {}, "most_memory_mb": 0, "longest_cpu_s": 0.0, "wrong": []})
            known["endings"] = dict(collections.Counter(known["endings"]) + collections.Counter(found["endings"]))
            known["wrong"] += found["wrong"]
            for most in ("most_memory_mb", "longest_cpu_s"):
                known[most] = max(known[most], found[most])
    return {"seeds": sorted(seeds), "kinds": {kind: kinds[kind] for kind in KINDS if kind in kinds}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="These files alone.")
    parser.add_argument("--limit-s", type=float, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="Results of earlier runs, to be written to --out as one.")
    wanted = parser.parse_args()
    if wanted.merge:
        wanted.out.write_text(json.dumps(merged(wanted.merge), indent=2) + "\n", encoding="utf-8")
        return 0
    found, began = {}, time.monotonic()
    for kind in [wanted.kind] if wanted.kind else KINDS:
        count = wanted.count or round(KINDS[kind][1] * wanted.share)
        numbers = wanted.only or list(range(count))
        found[kind] = attempt(kind, numbers, wanted.seed, wanted.limit_s)
        print(kind, json.dumps({name: value for name, value in found[kind].items() if name != "wrong"}), flush=True)
    if wanted.out is not None:
        said = {"seed": wanted.seed, "seconds": round(time.monotonic() - began), "kinds": found}
        wanted.out.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return 1 if any(result["wrong"] for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
