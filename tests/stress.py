"""Run the tests that wait for something many times in a row, beside processes that do nothing but take the processor.

python tests/stress.py [--runs 10] [--load 8] [what pytest should be told, for example a file]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:  # also where it is killed
    pass
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--load", type=int, default=8)
    wanted, more = parser.parse_known_args()
    options = ["-q", "-n", "auto", "--dist", "loadfile", "--max-worker-restart", "0", "-m", "waits"]
    tests = [sys.executable, "-m", "pytest", *options, *more]
    # Each in a session of its own, which is what Linux shares the processor out by.
    busy = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(wanted.load)]
    try:
        failed = [run for run in range(1, wanted.runs + 1) if subprocess.run(tests, check=False).returncode]
    finally:
        for process in busy:
            process.kill()
    print(f"{wanted.runs} runs beside {wanted.load} busy processes; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
