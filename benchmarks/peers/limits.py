"""What the machine can do at most: how fast memory is read, and the best products of three kinds. Printed as JSON.

python limits.py THREADS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

ROWS, WIDTH, OUT = 1024, 1152, 4304
"""A product of the tower's MLP."""
BYTES = 1 << 30


def machine_limits(threads: int) -> dict[str, float | None]:
    """GB and billions of operations a second; None where there are no instructions for it."""
    torch.set_num_threads(threads)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    operations = 2 * ROWS * WIDTH * OUT
    a, b = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, OUT)
    c, d = a.bfloat16(), b.bfloat16()
    read = torch.ones(BYTES // 4)
    limits: dict[str, float | None] = {
        "read_gb_per_s": round(BYTES / _best(read.sum) / 1e9, 1),
        "fp32_gops": round(operations / _best(lambda: a @ b) / 1e9),
        "int8_gops": round(operations / _best(_int8_product(threads)) / 1e9),
        "bf16_gops": None,
    }
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        limits["bf16_gops"] = round(operations / _best(lambda: c @ d) / 1e9)
    if "vnni" in flags:  # elsewhere torch has no fast kernel, and takes minutes
        i, j = (torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((ROWS, WIDTH), (WIDTH, OUT)))
        by_torch = round(operations / _best(lambda: torch._int_mm(i, j)) / 1e9)
        limits["int8_gops"] = max(limits["int8_gops"] or 0, by_torch)
    return limits


def _int8_product(threads: int) -> Callable[[], object]:
    """ONNX Runtime's product of uint8 and int8."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.integers(-64, 64, (WIDTH, OUT)).astype(np.int8), "b")
    a = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.UINT8, (ROWS, WIDTH))
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, (ROWS, OUT))
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "product", [a], [y], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"a": rng.integers(0, 255, (ROWS, WIDTH)).astype(np.uint8)}
    return lambda: session.run(None, feed)


def _best(run: Callable[[], object], seconds: float = 1.5) -> float:
    """The shortest of all runs within so many seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    print(json.dumps(machine_limits(int(sys.argv[1]))))
