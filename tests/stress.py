"""Run the tests that wait for something many times in a row, beside processes that do nothing but take the processor.

python tests/stress.py [--runs 10] [--at-once 1] [--load 8] [what pytest should be told, for example a file]

Several runs at once are done sooner, and are in each other's way besides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:  # also where it is killed
    pass
"""


def passes(run: int, more: Sequence[str]) -> bool:
    """One run, whose words are printed when it is over; whether nothing failed."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "waits", *more]
    done = subprocess.run(
        tests, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    print(f"run {run}:\n{done.stdout}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--load", type=int, default=8)
    wanted, more = parser.parse_known_args()
    # Each process in a session of its own, which is what Linux shares the processor out by.
    busy = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(wanted.load)]
    try:
        with ThreadPoolExecutor(wanted.at_once) as pool:
            passed = list(pool.map(lambda run: passes(run, more), range(1, wanted.runs + 1)))
    finally:
        for process in busy:
            process.kill()
    failed = [run for run, fine in enumerate(passed, 1) if not fine]
    print(f"{wanted.runs} runs, {wanted.at_once} at once, beside {wanted.load} busy processes; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
