"""How many threads are worth starting: cores that this process may use, and time that it is given on them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def default_threads(root: Path = ROOT) -> int:
    """One thread per physical core within the affinity mask and the cgroup's CPU quota; 0 (ONNX Runtime decides) if unknown.

    The quota is rounded down: all threads of a run wait for the one that is throttled.
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cores, quota = physical_cores(affinity, root), cpu_quota(root)
    if quota is None:
        return cores
    allowed = max(int(quota), 1)
    return min(cores, allowed) if cores else allowed


def physical_cores(cpus: Iterable[int], root: Path = ROOT) -> int:
    """Physical cores behind logical ones."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii"))
        except (OSError, ValueError):
            cores.add(str(cpu))
    return len(cores)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the cgroup, or one above it, allows; None: no limit. Both versions of cgroups."""
    quotas = [quota for folder in cgroup_folders(root, "cpu") if (quota := _folder_quota(folder)) is not None]
    return min(quotas, default=None)


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup and all above it, as far as they are visible."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            bases = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            bases = [mounts / controllers, mounts / controller]
        else:
            continue
        parts = [part for part in PurePosixPath(path).parts if part != "/"]
        if ".." in parts:  # above what this namespace shows
            parts = []
        for base in bases:
            for depth in range(len(parts) + 1):
                yield base.joinpath(*parts[:depth])


def _folder_quota(folder: Path) -> float | None:
    if (limit := _numbers(folder / "cpu.max")) is None:
        quota, period = _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us")
        limit = None if quota is None or period is None else quota[:1] + period[:1]
    if limit is None or len(limit) != 2 or min(limit) <= 0:  # "max", or -1 in version 1
        return None
    return limit[0] / limit[1]


def _numbers(path: Path) -> list[int] | None:
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return None
