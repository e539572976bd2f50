"""How much memory this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mcv_runtime.sessions.cores import ROOT, cgroup_folders

_LARGEST = 1 << 50
"""What cgroups of version 1 say where there is no limit is larger."""


def machine_memory(root: Path = ROOT) -> int | None:
    """Bytes: of the machine, or as many as the cgroup or one above it allows; None if nobody says."""
    limits = [limit for folder in cgroup_folders(root, "memory") if (limit := _folder_limit(folder)) is not None]
    with suppress(AttributeError, OSError, ValueError):  # Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _folder_limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = int((folder / name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there, or "max"
            continue
        return limit if 0 < limit < _LARGEST else None
    return None
