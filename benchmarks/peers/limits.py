"""What the machine can do at most: how fast memory is read, and the best products of three kinds. Printed as JSON.

python limits.py THREADS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROWS, WIDTH, OUT = 1024, 1152, 4304
"""A product of the tower's MLP."""
BYTES = 1 << 30


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    operations = 2 * ROWS * WIDTH * OUT
    a, b = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, OUT)
    i, j = (torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((ROWS, WIDTH), (WIDTH, OUT)))
    c, d = a.bfloat16(), b.bfloat16()
    read = torch.ones(BYTES // 4)
    limits: dict[str, float | None] = {
        "read_gb_per_s": round(BYTES / _best(read.sum) / 1e9, 1),
        "fp32_gops": round(operations / _best(lambda: a @ b) / 1e9),
        "int8_gops": round(operations / _best(lambda: torch._int_mm(i, j)) / 1e9),
        "bf16_gops": None,
    }
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        limits["bf16_gops"] = round(operations / _best(lambda: c @ d) / 1e9)
    print(json.dumps(limits))


def _best(run: Callable[[], object], seconds: float = 1.5) -> float:
    """The shortest of all runs within so many seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
