"""The model families, one file each; a new file here is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from mcv_export.plan import Family
from mcv_runtime.errors import CheckpointError, shown


def families() -> tuple[Family, ...]:
    """Every family, in the order of their file names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def recognise(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` belongs to; raises `CheckpointError`."""
    known = families()
    for family in known:
        if family.recognises(config):
            return family
    raise CheckpointError(
        f"config.json says architectures={shown(config.get('architectures'))}, version={shown(config.get('version'))}, which is"
        f" none of the families that this version of mcv knows: {', '.join(family.title for family in known)}"
    )
