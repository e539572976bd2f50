"""Streaming a checkpoint's tensors into a graph's external data file, a few rows at a time, quantized on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from mcv_export.checkpoint import Checkpoint, LoadedTensor, StoredTensor, matrix_shape
from mcv_export.plan import GraphPlan, Part, Transform
from mcv_export.quantize import quantize_rows
from mcv_graphs.layers import Embedding, Linear
from mcv_runtime.errors import CheckpointError

_CHUNK_VALUES = 1 << 23
"""Float values held at once (32 MB); quantizing needs a few times that."""
_PAGE, _LINE = 4096, 64
"""Large tensors start on page borders, so that a runtime can map them; small ones would waste a page each."""

_TRANSFORMS: dict[Transform, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "plus_one": lambda values: values + np.float32(1),
    "negative_exp": lambda values: -np.exp(values),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A weight [rows, columns] put together from checkpoint tensors; a vector has one column."""

    shape: tuple[int, int]
    parts: tuple[tuple[Part, StoredTensor | LoadedTensor, int], ...]  # the last is the part's number of rows

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) as float32."""
        pieces = []
        start = 0
        for part, tensor, count in self.parts:
            low, high = max(first - start, 0), min(last - start, count)
            if low < high:
                if part.transposed:
                    rows = tensor.rows(0, tensor.shape[0]).T[part.offset + low : part.offset + high]
                else:
                    rows = tensor.rows(part.offset + low, part.offset + high)
                rows = rows if part.transform is None else _TRANSFORMS[part.transform](rows)
                pieces.append(rows if part.scale == 1 else rows * np.float32(part.scale))
            start += count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def chunks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in order: (first row, rows)."""
        step = max(_CHUNK_VALUES // self.shape[1], 1)
        for first in range(0, self.shape[0], step):
            yield first, self.rows(first, min(first + step, self.shape[0]))


def resolve(plan: GraphPlan, module: nn.Module, checkpoint: Checkpoint) -> dict[str, Source]:
    """Where each parameter comes from; raises `CheckpointError` for a tensor that is missing or of another shape."""
    sources = {}
    for name, (rows, columns) in _parameter_shapes(module).items():
        if name in plan.computed:
            continue
        parts = []
        for part in plan.weights[name]:
            tensor = checkpoint.tensor(part.tensor)
            count = rows if part.rows is None else part.rows
            wanted = (part.stored or count, columns)
            if part.transposed:
                wanted = wanted[::-1]
            if matrix_shape(tensor.shape) != wanted:
                want = list(wanted) if len(tensor.shape) > 1 or columns > 1 else [wanted[0]]
                raise CheckpointError(f"tensor {part.tensor} has shape {list(tensor.shape)}, but config.json asks for {want}")
            if isinstance(tensor, StoredTensor) and tensor.dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(
                    f"tensor {part.tensor} has type {tensor.dtype}; build from a checkpoint in bf16, fp16 or fp32"
                )
            parts.append((part, tensor, count))
        sources[name] = Source((rows, columns), tuple(parts))
    return sources


def _parameter_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of each parameter as if no weight were quantized, by name; a vector has one column."""
    shapes = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(child, Linear):
            shapes[f"{prefix}weight"] = (child.out_features, child.in_features)
        elif isinstance(child, Embedding):
            shapes[f"{prefix}weight"] = (child.rows, child.width)
        for name, value in child.named_parameters(recurse=False):
            shapes.setdefault(f"{prefix}{name}", (value.shape[0], int(np.prod(value.shape[1:]))))
    return shapes


def layout(model: ir.Model, module: nn.Module, tied: Mapping[str, str]) -> tuple[dict[str, int], int]:
    """Where each of the module's tensors starts in the data file, and that file's size; a tied layer's are its twin's."""
    names, twins = _tensor_names(module), _twins(module, tied)
    offsets: dict[str, int] = {}
    end = 0
    for name, value in model.graph.initializers.items():
        if name in names and name not in twins:
            assert value.shape is not None and value.dtype is not None
            size = int(np.prod(value.shape.numpy())) * int(value.dtype.itemsize)
            alignment = _PAGE if size >= 16 * _PAGE else _LINE
            offsets[name] = -(-end // alignment) * alignment
            end = offsets[name] + size
    return offsets | {name: offsets[twin] for name, twin in twins.items()}, end


def _tensor_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}


def _twins(module: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """The tensors of tied layers, each with the one whose bytes it has."""
    names = _tensor_names(module)
    pairs = {
        name: f"{tied[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in names if name.rpartition(".")[0] in tied
    }
    return {name: twin for name, twin in pairs.items() if twin in names}


def write_weights(
    file: Path,
    model: ir.Model,
    module: nn.Module,
    sources: Mapping[str, Source],
    plan: GraphPlan,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Write every tensor of the graph to `file` and point its initializer there; `advance` gets the parameters done.

    Returns where each tensor starts.
    """
    computed, twins = plan.computed, _twins(module, plan.tied)
    offsets, size = layout(model, module, plan.tied)
    with file.open("wb") as stream:
        stream.truncate(size)
        for name, offset in offsets.items():
            owner, _, leaf = name.rpartition(".")
            child = module.get_submodule(owner)
            if name in twins:
                advance(sources[f"{owner}.weight"].size if leaf == "qweight" else 0)
            elif name in computed:
                _write(stream, offset, computed[name]())
            elif leaf == "qweight" and isinstance(child, Linear | Embedding):
                at = {
                    key: offsets[f"{owner}.{key}"]
                    for key in ("qweight", "scales", "zero_points")
                    if f"{owner}.{key}" in offsets
                }
                _write_blocks(stream, at, sources[f"{owner}.weight"], child, advance)
            elif leaf == "weight" and isinstance(child, Linear):
                _write_transposed(stream, offset, sources[name], advance)
            elif leaf not in ("scales", "zero_points"):
                for first, rows in sources[name].chunks():
                    _write(stream, offset + first * rows[0].nbytes, rows)
                    advance(rows.size)
    point(model, file, offsets)
    return offsets


def point(model: ir.Model, file: Path, offsets: Mapping[str, int]) -> None:
    """Have the graph read those of its tensors that `file` holds from there."""
    for name in model.graph.initializers.keys() & offsets.keys():
        value = model.graph.initializers[name]
        assert value.shape is not None and value.dtype is not None
        length = int(np.prod(value.shape.numpy())) * value.dtype.itemsize
        value.const_value = ir.ExternalTensor(
            file.name, offsets[name], int(length), value.dtype, shape=ir.Shape(value.shape), name=name, base_dir=file.parent
        )


def _write_blocks(
    stream: BinaryIO, at: dict[str, int], source: Source, child: Linear | Embedding, advance: Callable[[int], None]
) -> None:
    """The quantized weight chunk by chunk; its scales and zero points are small and follow each chunk to their own places."""
    for first, rows in source.chunks():
        blocks = quantize_rows(rows, child.format)
        for key, offset in at.items():
            array = getattr(blocks, key)
            _write(stream, offset + first * array[0].nbytes, array)
        advance(rows.size)


def _write_transposed(stream: BinaryIO, offset: int, source: Source, advance: Callable[[int], None]) -> None:
    """A float weight as [in, out]: bands of columns, each gathered from chunks of rows."""
    rows, columns = source.shape
    band = max(4 * _CHUNK_VALUES // rows, 1)
    for start in range(0, columns, band):
        stop = min(start + band, columns)
        transposed = np.empty((stop - start, rows), np.float32)
        for first, chunk in source.chunks():
            transposed[:, first : first + len(chunk)] = chunk[:, start:stop].T
        _write(stream, offset + start * rows * 4, transposed)
        advance(transposed.size)


def _write(stream: BinaryIO, offset: int, array: NDArray[Any]) -> None:
    stream.seek(offset)
    stream.write(np.ascontiguousarray(array).data)
