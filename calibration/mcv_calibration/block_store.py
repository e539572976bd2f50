"""Quantized weights on disk, one file for each layer of a walk: what an interrupted one need not do again."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mcv_calibration.blocks import Blocks

_FIELDS = ("qweight", "scales", "zero_points")


class BlockStore(Mapping[str, Blocks]):
    """Blocks by the path of their linear, each read from its file when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}

    def write(self, layer: str, blocks: Mapping[str, Blocks]) -> None:
        """Keep all linears of a layer, or none."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(layer)
        arrays = {
            f"{path}/{field}": getattr(found, field)
            for path, found in blocks.items()
            for field in _FIELDS
            if getattr(found, field) is not None
        }
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)
        partial.replace(file)
        self._files |= dict.fromkeys(blocks, file)

    def find(self, layer: str, paths: set[str]) -> bool:
        """Whether an earlier walk left these linears of a layer, undamaged."""
        file = self._file(layer)
        try:
            with file.open("rb") as stream, np.load(stream) as stored:  # numpy leaves a damaged file open
                if {name.rpartition("/")[0] for name in stored.files} != paths:
                    return False
                for name in stored.files:
                    stored[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return False
        self._files |= dict.fromkeys(paths, file)
        return True

    def __getitem__(self, path: str) -> Blocks:
        with np.load(self._files[path]) as stored:
            zeros = stored[f"{path}/zero_points"] if f"{path}/zero_points" in stored.files else None
            return Blocks(qweight=stored[f"{path}/qweight"], scales=stored[f"{path}/scales"], zero_points=zeros)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _file(self, layer: str) -> Path:
        return self._folder / f"{layer}.npz"
