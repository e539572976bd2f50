"""Whether this machine answers from a bundle as it is meant: its ONNX Runtime, and its processor's sums of 8-bit products."""

from __future__ import annotations

import logging
import platform
from functools import cache

import numpy as np

from mcv_runtime.bundle.manifest import NeedsSpec
from mcv_runtime.errors import MachineError

_PRODUCT = (
    b'\x08\x08:b\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01gZ\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03'
    b"\x12\x01m\n\x03\x12\x01kZ\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01nb\x15\n\x01y\x12\x10"
    b"\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\n"
)
"""A graph of one node: y = MatMulInteger(a, b), a uint8 [m, k], b int8 [k, n], y int32 [m, n] (IR 8, operator set 10)."""
_log = logging.getLogger(__name__)


def check_machine(needs: NeedsSpec) -> None:
    """Raise `MachineError` where answers would be wrong or none; log where they would be slow."""
    import onnxruntime as ort

    if _numbers(ort.__version__) < _numbers(needs.onnxruntime):
        raise MachineError(
            f"the bundle needs ONNX Runtime {needs.onnxruntime} or newer, and {ort.__version__} is installed; "
            f"run `pip install 'onnxruntime>={needs.onnxruntime}'`"
        )
    if needs.processor == "avx512_vnni" and not sums_exactly():
        raise MachineError(
            "the bundle is for processors with VNNI: this one's sums of 8-bit products overflow; "
            "build the bundle again here, or with `--target avx2`"
        )
    if needs.processor == "arm64" and not is_arm():
        _log.warning("the bundle is for arm64, and slow on this processor: build it again here, or with another --target")


@cache
def sums_exactly() -> bool:
    """Whether ONNX Runtime adds up products of uint8 and int8 exactly here, found out by a sum of the largest ones.

    Where x86 lacks VNNI it adds them in pairs of 16 bits, which saturate.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_PRODUCT, options, providers=["CPUExecutionProvider"])
    a_MK, b_KN = np.full((4, 16), 255, np.uint8), np.full((16, 8), 127, np.int8)
    (y_MN,) = session.run(None, {"a": a_MK, "b": b_KN})
    return bool((y_MN == 255 * 127 * 16).all())


def is_arm() -> bool:
    return platform.machine().lower() in ("arm64", "aarch64")


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: `1.31.0rc1` -> (1, 31, 0)."""
    found = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        found.append(int(digits or 0))
        if digits != part:
            break
    while found and not found[-1]:
        found.pop()
    return tuple(found)
