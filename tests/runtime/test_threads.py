"""How many threads are started, on machines made of files."""

import os

import pytest

from mcv_runtime.sessions import cores as threads
from mcv_runtime.sessions.cores import cpu_quota, default_threads, physical_cores


@pytest.fixture
def machine(tmp_path):
    """Write files of a machine's root folder; four cores of two threads each."""

    def write(files=()):
        for cpu in range(8):
            path = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
        for name, text in dict(files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_physical_cores(machine, tmp_path):
    root = machine()
    assert physical_cores(range(8), root) == 4
    assert physical_cores([0, 4], root) == 1
    assert physical_cores([1, 2, 6], root) == 2
    assert physical_cores([0, 1, 2], tmp_path / "nothing") == 3
    assert physical_cores([], root) == 0


# File names and contents: https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/cpuacct.html and sched-bwc.html
V1 = "12:pids:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n"
QUOTAS = {
    "version 2": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, a limit above": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
        },
        3.0,
    ),
    "version 2, the tightest counts": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "100000 50000\n",
        },
        2.0,
    ),
    "version 2, in a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
    "version 2, outside of the namespace": ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "2 1\n"}, 2.0),
    "version 2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "version 1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "version 1, in a container": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        1.0,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "nonsense": ({"proc/self/cgroup": "what?\n\n0::\n", "sys/fs/cgroup/cpu.max": "lots of\n"}, None),
    "no cgroups": ({}, None),
}


@pytest.mark.parametrize("files,quota", QUOTAS.values(), ids=QUOTAS)
def test_cpu_quota(machine, files, quota):
    assert cpu_quota(machine(files)) == quota


@pytest.mark.parametrize("quota,expected", [("max 100000", 4), ("250000 100000", 2), ("10000 100000", 1), ("900000 100000", 4)])
def test_default(machine, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_threads(machine({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})) == expected


def test_affinity_counts(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7}, raising=False)
    assert default_threads(machine()) == 1


def test_without_affinity_masks_onnxruntime_decides(machine, monkeypatch):
    monkeypatch.delattr(threads.os, "sched_getaffinity", raising=False)
    assert default_threads(machine()) == 0
