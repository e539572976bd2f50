"""Streaming a checkpoint's tensors into a graph's external data file, a few rows at a time, quantized on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from mcv_export.layer_weights import constants, int8_rows, quantized_chunks
from mcv_export.plan import GraphPlan
from mcv_export.sources import CHUNK_VALUES, Source, require_finite
from mcv_export.storage import Storage
from mcv_graphs.formats import Int8Format
from mcv_graphs.layers import Embedding, Linear

_PAGE, _LINE = 4096, 64
"""Large tensors start on page borders, so that a runtime can map them; small ones would waste a page each."""
_BAND_BYTES = 4 * 4 * CHUNK_VALUES
"""Of a transposed weight, what is gathered before it is written."""


def layout(model: ir.Model, module: nn.Module, twins: Mapping[str, str]) -> tuple[dict[str, int], int]:
    """Where each of the module's tensors starts in the data file, and that file's size; a tied layer's are its twin's."""
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
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


def write_weights(
    file: Path,
    model: ir.Model,
    module: nn.Module,
    sources: Mapping[str, Source],
    plan: GraphPlan,
    storage: Storage,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Write every tensor of the graph to `file` and point its initializer there; `advance` gets the parameters done.

    Returns where each tensor starts.
    """
    computed, twins = plan.computed, storage.twins(plan, module)
    offsets, size = layout(model, module, twins)
    with file.open("wb") as stream:
        stream.truncate(size)
        for name, offset in offsets.items():
            owner, _, leaf = name.rpartition(".")
            child = module.get_submodule(owner)
            if name in twins:
                advance(sources[f"{owner}.weight"].size if leaf in ("qweight", "weight") else 0)
            elif name in computed:
                values = computed[name]()
                require_finite(values, name)
                _write(stream, offset, values)
            elif leaf == "qweight" and isinstance(child, Linear | Embedding):
                at = {leaf: offsets[f"{owner}.{leaf}"] for leaf, _ in child.named_buffers(recurse=False)}
                write = _write_int8 if isinstance(child.format, Int8Format) else _write_blocks
                write(stream, at, owner, sources[f"{owner}.weight"], child, storage, advance)
            elif leaf == "weight" and isinstance(child, Linear):
                _write_transposed(stream, offset, sources[name], advance)
            elif name in sources:
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
    stream: BinaryIO,
    at: Mapping[str, int],
    path: str,
    source: Source,
    child: Linear | Embedding,
    storage: Storage,
    advance: Callable[[int], None],
) -> None:
    """The quantized weight chunk by chunk; its scales and zero points are small and follow each chunk to their own places."""
    for leaf, array in constants(child, path, storage).items():
        _write(stream, at[leaf], array)
    for first, tensors in quantized_chunks(child, path, source, storage):
        for leaf, array in tensors.items():
            _write(stream, at[leaf] + first * array[0].nbytes, array)
        advance(len(tensors["qweight"]) * source.shape[1])


def _write_int8(
    stream: BinaryIO,
    at: Mapping[str, int],
    path: str,
    source: Source,
    child: Linear | Embedding,
    storage: Storage,
    advance: Callable[[int], None],
) -> None:
    """The weight as [in, out], and what goes with it. A row's scale depends on that row alone: each band finds it anew."""
    assert isinstance(child.format, Int8Format)
    for leaf, array in constants(child, path, storage).items():
        _write(stream, at[leaf], array)
    largest = child.format.largest

    def quantized(first: int, rows: NDArray[np.float32]) -> NDArray[np.int8]:
        tensors = int8_rows(rows, largest)
        _write(stream, at["weight_scales"] + first * 4, tensors["weight_scales"])
        return tensors["qweight"]

    _write_bands(stream, at["qweight"], source, np.dtype(np.int8), quantized, advance)


def _write_transposed(stream: BinaryIO, offset: int, source: Source, advance: Callable[[int], None]) -> None:
    """A float weight as [in, out]."""
    _write_bands(stream, offset, source, np.dtype(np.float32), lambda _, rows: rows, advance)


def _write_bands(
    stream: BinaryIO,
    offset: int,
    source: Source,
    dtype: np.dtype[Any],
    convert: Callable[[int, NDArray[np.float32]], NDArray[Any]],
    advance: Callable[[int], None],
) -> None:
    """Bands of columns, each gathered from chunks of rows, as rows of what is written."""
    rows, columns = source.shape
    band = max(_BAND_BYTES // dtype.itemsize // rows, 1)
    for start in range(0, columns, band):
        stop = min(start + band, columns)
        transposed = np.empty((stop - start, rows), dtype)
        for first, chunk in source.chunks():
            transposed[:, first : first + len(chunk)] = convert(first, chunk)[:, start:stop].T
        _write(stream, offset + start * rows * dtype.itemsize, transposed)
        advance(transposed.size)


def _write(stream: BinaryIO, offset: int, array: NDArray[Any]) -> None:
    stream.seek(offset)
    stream.write(np.ascontiguousarray(array).data)
