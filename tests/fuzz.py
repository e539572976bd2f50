"""Run the tests that draw their examples, with new ones in each round, until the time is up or one fails.

    python tests/fuzz.py [--minutes 5] [--seed 123] [what pytest should be told, for example a file]

With --seed, the one round that a failure has named.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int)
    wanted, more = parser.parse_known_args()
    until, rounds = time.monotonic() + 60 * wanted.minutes, 0
    while not rounds or (wanted.seed is None and time.monotonic() < until):
        seed, rounds = random.randrange(10**9) if wanted.seed is None else wanted.seed, rounds + 1
        options = ["-q", "-m", "fuzz or hypothesis", "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
        if code := subprocess.run([sys.executable, "-m", "pytest", *options, *more], check=False).returncode:
            print(f"round {rounds}, with --seed {seed}, has failed; `make fuzz SEED={seed}` repeats it")
            return code
    print(f"{rounds} rounds, and nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
