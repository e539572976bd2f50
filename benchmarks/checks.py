"""What the checks of strangers' files cost: this version beside one without them, in processes that take turns.

    python benchmarks/checks.py benchmarks/results/checks.json --before FOLDER_OF_ANOTHER_VERSION [--bundle NOW THEN]

A whole `mcv-run` on the demonstration model, from its start to its end, and with `--bundle` (one for each version, of the same
checkpoint) one request about a picture, beside the time to open the bundle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from full_size import _cpu

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "models" / "tiny" / "demo.png"
REQUEST = """
import json, sys
from mcv_runtime import load
engine = load(sys.argv[1], threads=2)
engine.ask(None, "Hi", max_new_tokens=2)
answer = engine.ask(sys.argv[2], "What does the text say?", max_new_tokens=16, max_slice_nums=1, repetition_penalty=1.0)
t = answer.timings
print(json.dumps({"load": t.load, "preprocess": t.preprocess, "vision": t.vision, "prefill": t.prefill, "decode": t.decode}))
"""


def _run(version: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(version / "runtime"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], check=True, env=environment, capture_output=True, text=True).stdout


def demo(version: Path) -> dict[str, float]:
    """Seconds of a whole process that answers one question."""
    command = "import sys; from mcv_runtime.{0} import main; sys.argv[0] = 'mcv-run'; main()"
    module = "command.cli" if (version / "runtime" / "mcv_runtime" / "command").is_dir() else "cli"
    start = time.perf_counter()
    _run(version, "-c", command.format(module), "--image", str(PICTURE), "--prompt", "What does the text say?")
    return {"process": time.perf_counter() - start}


def request(version: Path, bundle: Path) -> dict[str, float]:
    """Seconds of each part of one request."""
    found: dict[str, float] = json.loads(_run(version, "-c", REQUEST, str(bundle), str(PICTURE)))
    return found | {"request": sum(found.values()) - found["load"]}


def turns(now: Any, then: Any, rounds: int) -> dict[str, Any]:
    """Medians of both, and the median and the range of the ratios of each round."""
    now(), then()  # files are in memory, digests known
    pairs = [(now(), then()) if number % 2 else (then(), now())[::-1] for number in range(rounds)]
    result = {}
    for name in pairs[0][0]:
        ratios = sorted(mine[name] / other[name] for mine, other in pairs)
        result[name] = {
            "now_s": round(statistics.median(mine[name] for mine, _ in pairs), 4),
            "before_s": round(statistics.median(other[name] for _, other in pairs), 4),
            "ratio": round(statistics.median(ratios), 3),
            "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, nargs=2)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    result: dict[str, Any] = {"cpu": _cpu(), "rounds": given.rounds}
    result["mcv-run on the demo"] = turns(lambda: demo(ROOT), lambda: demo(given.before), given.rounds)
    if given.bundle:
        here, there = given.bundle
        result[here.name] = turns(lambda: request(ROOT, here), lambda: request(given.before, there), given.rounds)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
