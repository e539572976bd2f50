"""An adapter that a user names: a folder or a hub id, and how much of it to merge."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mcv_export.adapters.files import BESIDE, EXTENDED
from mcv_export.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mcv_export.hub import locate_files
from mcv_runtime.bundle.manifest import AdapterSpec, FileSpec
from mcv_runtime.errors import CheckpointError, OptionError
from mcv_runtime.files import at_home

_WEIGHT = re.compile(r"(?P<place>.+):(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A folder that PEFT saved. `name` is what a bundle's manifest calls it, `weight` the part of its change that is merged."""

    folder: Path
    name: str
    revision: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise OptionError(f"the weight of the adapter {self.name} is {self.weight}; a finite number is wanted")

    def spec(self, paths: Sequence[Path]) -> AdapterSpec:
        """What a manifest says of it; `paths` are the files that it was read from."""
        files = {path.name: _describe(path) for path in paths}
        return AdapterSpec(name=self.name, revision=self.revision, weight=self.weight, files=files)


def find_adapter(text: str, *, cache_dir: Path | None = None) -> Adapter:
    """The adapter that `FOLDER_OR_ID[@REVISION][:WEIGHT]` names, downloaded first if it is a hub id.

    What is there as a folder is taken as it is written. Raises `CheckpointError` and `OptionError`.
    """
    place, weight = text, 1.0
    if not at_home(text).exists() and (found := _WEIGHT.fullmatch(text)):
        place, weight = found["place"], float(found["weight"])
    folder = at_home(place)
    if folder.exists():  # a path says where an adapter lay, not what it is
        return Adapter(folder=folder, name=folder.resolve().name, weight=weight)
    hub_id, _, revision = place.partition("@")
    patterns = [ADAPTER_CONFIG, *ADAPTER_WEIGHTS, *BESIDE, *EXTENDED]
    fetched = locate_files(hub_id, patterns, revision=revision or None, cache_dir=cache_dir)
    if fetched is None:
        raise CheckpointError(
            f"{place} is neither the folder of an adapter nor a hub id such as owner/name or owner/name@revision"
        )
    return Adapter(folder=fetched, name=hub_id, revision=revision or None, weight=weight)


def _describe(path: Path) -> FileSpec:
    with path.open("rb") as stream:
        return FileSpec(size=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())
