"""Reading a published checkpoint: its config, and its tensors a few rows at a time.

Files are read, not mapped: a mapped file counts as resident memory, and a build must stay small beside a large model.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mcv_export.config import Config
from mcv_runtime.errors import CheckpointError

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor taken as a matrix: later axes flattened, a vector as one column, a leading 1 dropped."""
    if len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape[0] if shape else 1, math.prod(shape[1:])


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, `start` bytes into it; also carries what reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) as float32, the tensor taken as a matrix: [last - first, columns]."""
        columns = matrix_shape(self.shape)[1]
        kind = _DTYPES[self.dtype]
        raw = np.fromfile(self.file, kind, (last - first) * columns, offset=self.start + first * columns * kind.itemsize)
        if raw.size != (last - first) * columns:
            raise CheckpointError(f"{self.file.name} ended while {self.name} was read; download it again")
        if self.dtype == "BF16":
            raw = (raw.astype("<u4") << 16).view("<f4")
        array: NDArray[np.float32] = raw.astype(np.float32, copy=False).reshape(last - first, columns)
        return array


@dataclass(frozen=True, slots=True)
class LoadedTensor:
    """One tensor of a `.bin` file, mapped by torch."""

    name: str
    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self.value.reshape(matrix_shape(self.shape))[first:last].float().numpy()
        return array


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder in the Hugging Face layout."""

    folder: Path
    config: Config
    tensors: Mapping[str, StoredTensor | LoadedTensor]
    opened: dict[str, Config] = field(default_factory=dict, repr=False)
    """The JSON files that were asked for, but for config.json."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):  # a changed copy of it
            object.__setattr__(self, "config", Config(self.config))

    def json(self, name: str) -> Config:
        """A JSON file of the checkpoint, empty if it is not there; the same object each time."""
        if name not in self.opened:
            path = self.folder / name
            self.opened[name] = Config(_read_json(path) if path.exists() else {}, name)
        return self.opened[name]

    def text(self, name: str) -> str:
        """A text file of the checkpoint; raises `CheckpointError`."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.folder / name} cannot be read as text ({error})") from None

    def tensor(self, name: str) -> StoredTensor | LoadedTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}; is a file of it missing?") from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read `config.json` and every tensor's place, but no tensor; raises `CheckpointError`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is neither a folder nor a hub id such as openbmb/MiniCPM-V-2_6")
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json; a checkpoint folder holds config.json, tokenizer.json and *.safetensors"
        )
    config = _read_json(folder / "config.json")
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if quantized := place.get(key) if isinstance(place, dict) else None:
                method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
                raise CheckpointError(f"{folder} is already quantized ({method}); build from the full-precision checkpoint")
    return Checkpoint(folder, Config(config), _find_tensors(folder))


def _find_tensors(folder: Path) -> dict[str, StoredTensor | LoadedTensor]:
    for index_name, single, read in (
        ("model.safetensors.index.json", "model.safetensors", _read_safetensors_header),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", _map_torch_file),
    ):
        if (folder / index_name).exists():
            weight_map = _read_json(folder / index_name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{folder / index_name} has no weight_map; download it again")
            files = sorted(set(weight_map.values()))
        elif (folder / single).exists():
            files = [single]
        else:
            continue
        tensors: dict[str, StoredTensor | LoadedTensor] = {}
        for name in files:
            # The index comes from a stranger: a shard is a file of this folder, nothing else.
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{folder} lacks the shard {name}; download it again")
            tensors |= read(folder / name)
        return tensors
    raise CheckpointError(f"{folder} has no weights: neither model.safetensors, nor its index, nor pytorch_model.bin")


def _read_safetensors_header(file: Path) -> dict[str, StoredTensor | LoadedTensor]:
    """Format: https://github.com/huggingface/safetensors#format"""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file.name} is truncated ({size} bytes); download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise CheckpointError(f"{file.name} is not a safetensors file") from None
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor | LoadedTensor] = {}
    end = 8 + length
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file.name} has a damaged header at {name}") from None
        end = max(end, 8 + length + stop)
        if dtype in _DTYPES and stop - start != int(np.prod(shape)) * _DTYPES[dtype].itemsize:
            raise CheckpointError(
                f"{file.name} has a damaged header: {name} has {stop - start} bytes for shape {list(shape)} {dtype}"
            )
        tensors[name] = StoredTensor(name, shape, dtype, file, 8 + length + start)
    if end > size:
        raise CheckpointError(f"{file.name} is truncated: {size} of {end} bytes; download it again")
    return tensors


def _map_torch_file(file: Path) -> dict[str, StoredTensor | LoadedTensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(f"{file.name} cannot be read ({str(error).splitlines()[0]}); download it again") from None
    return {name: LoadedTensor(name, value) for name, value in state.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data
