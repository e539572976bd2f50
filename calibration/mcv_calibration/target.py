"""What kind of processor a bundle is made for: which products of 8-bit integers it runs fast."""

from __future__ import annotations

from typing import Literal, get_args

from mcv_runtime.errors import OptionError, shown
from mcv_runtime.sessions.machine import is_arm, sums_exactly

Target = Literal["avx512_vnni", "avx2", "arm64"]
TARGETS: tuple[Target, ...] = get_args(Target)


def this_machine() -> Target:
    """The target that this processor is, whatever the system: ONNX Runtime itself shows what its sums do."""
    if is_arm():
        return "arm64"
    return "avx512_vnni" if sums_exactly() else "avx2"


def chosen(target: str | None) -> Target:
    """A target by name, by default this machine; raises `OptionError`."""
    if target is None:
        return this_machine()
    if target not in TARGETS:
        raise OptionError(f"target {shown(target)} is none of {', '.join(TARGETS)}")
    return target
