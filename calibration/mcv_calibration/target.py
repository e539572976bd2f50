"""What kind of processor a bundle is made for: which products of 8-bit integers it runs fast."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal, get_args

from mcv_graphs.formats import Int8Format
from mcv_runtime.errors import OptionError

Target = Literal["avx512_vnni", "avx2", "arm64"]
TARGETS: tuple[Target, ...] = get_args(Target)
_CPUINFO = Path("/proc/cpuinfo")


def this_machine() -> Target:
    """The target that this processor is; without a way to know, the one that is right on every x86."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    flags = _flags(_CPUINFO.read_text(encoding="utf-8")) if _CPUINFO.exists() else set()
    return "avx512_vnni" if flags & {"avx512_vnni", "avx_vnni"} else "avx2"


def chosen(target: str | None) -> Target:
    """A target by name, by default this machine; raises `OptionError`."""
    if target is None:
        return this_machine()
    if target not in TARGETS:
        raise OptionError(f"target {target!r} is none of {', '.join(TARGETS)}")
    return target


def int8_format(target: Target, activations: Literal["static", "dynamic"]) -> Int8Format:
    """Unsigned activations on x86, where its fast kernels want them; 7-bit weights where 16-bit sums could overflow.

    The operator for dynamic activations takes unsigned ones everywhere.
    """
    signed = target == "arm64" and activations == "static"
    return Int8Format(activations=activations, signed=signed, reduce_range=target == "avx2")


def _flags(cpuinfo: str) -> set[str]:
    """The first processor's features."""
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())
