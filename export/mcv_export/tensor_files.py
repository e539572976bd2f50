"""Files of tensors, of safetensors and of torch: where each tensor is, and its rows as they are asked for.

Files are read, not mapped: a mapped file counts as resident memory, and a build must stay small beside a large model.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mcv_runtime.errors import CheckpointError, printable, shown
from mcv_runtime.files import open_regular, parse_json

_FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_TORCH_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HEADER_BYTES = 100_000_000
"""What safetensors' own reader allows."""


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
        """Rows [first, last) as float32, the tensor taken as a matrix: [last - first, columns], the caller's own to change."""
        columns = matrix_shape(self.shape)[1]
        kind = require_float(self)
        raw = np.fromfile(self.file, kind, (last - first) * columns, offset=self.start + first * columns * kind.itemsize)
        if raw.size != (last - first) * columns:
            raise CheckpointError(f"{self.file.name} ended while {self.name} was read; download it again")
        if self.dtype == "BF16":
            raw = np.left_shift(raw, np.uint32(16), dtype=np.uint32).view(np.float32)
        with np.errstate(over="ignore"):  # who uses the values looks whether they are finite
            array: NDArray[np.float32] = raw.astype(np.float32, copy=False).reshape(last - first, columns)
        return array


@dataclass(frozen=True, slots=True)
class LoadedTensor:
    """One tensor of a torch file, mapped by torch."""

    name: str
    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> str:
        return _TORCH_FLOATS.get(self.value.dtype, str(self.value.dtype).removeprefix("torch."))

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) as float32, the tensor taken as a matrix: [last - first, columns], the caller's own to change."""
        require_float(self)
        rows = self.value.reshape(matrix_shape(self.shape))[first:last]
        array: NDArray[np.float32] = rows.to(torch.float32, copy=True).numpy()
        return array


def require_float(tensor: StoredTensor | LoadedTensor) -> np.dtype[Any]:
    """How a tensor's numbers are stored; raises `CheckpointError` where they are no plain floats."""
    if tensor.dtype not in _FLOATS:
        name, dtype = printable(tensor.name), printable(tensor.dtype[:80])
        raise CheckpointError(f"tensor {name} has type {dtype}; build from a checkpoint in bf16, fp16 or fp32")
    return _FLOATS[tensor.dtype]


def read_tensors(file: Path) -> Mapping[str, StoredTensor | LoadedTensor]:
    """The tensors of one file by name; raises `CheckpointError`.

    A link is followed wherever it leads: weights often lie on a larger disk, and no text is ever made of them.
    """
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)


def _read_safetensors(file: Path) -> dict[str, StoredTensor | LoadedTensor]:
    """Format: https://github.com/huggingface/safetensors#format"""
    with open_regular(file, error=CheckpointError) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file.name} is truncated ({size} bytes); download it again")
        what = f"the header of {file.name}"
        header = parse_json(stream.read(min(length, _HEADER_BYTES + 1)), what, error=_damaged, max_bytes=_HEADER_BYTES)
    if not isinstance(header, dict):
        raise _damaged(f"{what} is no object")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor | LoadedTensor] = {}
    places = []
    for name, entry in header.items():
        dtype, shape, start, stop = _entry(entry, f"{what}, at {shown(name)},")
        if dtype in _FLOATS and stop - start != math.prod(shape) * _FLOATS[dtype].itemsize:
            raise _damaged(f"{what} gives {shown(name)} {stop - start} bytes for shape {shown(list(shape))} {dtype}")
        places.append((start, stop))
        tensors[name] = StoredTensor(name, shape, dtype, file, 8 + length + start)
    end = 0
    for start, stop in sorted(places):
        if start < end:
            raise _damaged(f"{what} gives two tensors the same bytes")
        end = stop
    if 8 + length + end > size:
        raise CheckpointError(f"{file.name} is truncated: {size} of {8 + length + end} bytes; download it again")
    return tensors


def _entry(entry: object, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, and the tensor's place among the bytes behind the header."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]}:
            if all(type(number) is int and number >= 0 for number in (*shape, start, stop)) and start <= stop:
                return dtype, tuple(shape), start, stop
    raise _damaged(f"{where} is no tensor")


def _damaged(message: str) -> CheckpointError:
    return CheckpointError(f"{message}; download it again")


def _read_torch(file: Path) -> dict[str, StoredTensor | LoadedTensor]:
    with open_regular(file, error=CheckpointError):
        pass  # torch opens by name: that is done only where there is a plain file
    try:
        # the format before torch 1.6 is no zip file, and cannot be mapped: it is read whole
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # what a damaged pickle raises is not bounded
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise CheckpointError(
                f"{file.name} holds more than tensors, and code in it is never run; save it again with "
                "torch.save(model.state_dict(), ...)"
            ) from None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _damaged(f"{file.name} cannot be read ({printable(reason[:200])})") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file.name} holds a {type(state).__name__}, not tensors by name; save model.state_dict()")
    tensors: dict[str, StoredTensor | LoadedTensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file.name} has {shown(name)}, which is no tensor with a name; save model.state_dict()")
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(f"{file.name} has {shown(name)} as a tensor without plain values; save it as a dense one")
        tensors[name] = LoadedTensor(name, value.detach())
    return tensors
