"""Streaming a checkpoint's tensors into a graph's external data file, a few rows at a time, quantized on the way.

Each piece has its own place in the file: threads read, quantize and write pieces in any order, and the file is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from mcv_export.layer_weights import constants, layer_rows, layer_spans
from mcv_export.plan import GraphPlan
from mcv_export.sources import PIECE_VALUES, Source, require_finite
from mcv_export.storage import Storage
from mcv_graphs.formats import Tensors
from mcv_graphs.layers import Embedding, Linear

_PAGE, _LINE = 4096, 64
"""Large tensors start on page borders, so that a runtime can map them; small ones would waste a page each."""
_COLUMN_VALUES = 4 * PIECE_VALUES
"""Of a piece that is written as columns: more rows make longer runs of bytes in the file."""
_TURNED = 64
"""Rows that are turned into columns at once: few enough for a processor's cache."""


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
    pool: Executor,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Write every tensor of the graph to `file` and point its initializer there; `advance` gets the parameters done.

    Returns where each tensor starts.
    """
    twins = storage.twins(plan, module)
    offsets, size = layout(model, module, twins)
    with file.open("wb") as stream:
        stream.truncate(size)
    writer = _Writer(file, offsets, module, sources, plan, storage)
    pieces = [piece for name in offsets if name not in twins for piece in writer.pieces(name)]
    futures = [pool.submit(write, *arguments) for _, write, *arguments in pieces]
    for (parameters, *_), future in zip(pieces, futures, strict=True):
        future.result()
        advance(parameters)
    for name in twins:
        owner, _, leaf = name.rpartition(".")
        advance(sources[f"{owner}.weight"].size if leaf in ("qweight", "weight") else 0)
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


@dataclass(frozen=True, slots=True)
class _Writer:
    """What writes any piece of one file."""

    file: Path
    offsets: Mapping[str, int]
    module: nn.Module
    sources: Mapping[str, Source]
    plan: GraphPlan
    storage: Storage

    def pieces(self, name: str) -> list[tuple[Any, ...]]:
        """How a tensor is written: for each piece, its parameters, a function and what it is given."""
        owner, _, leaf = name.rpartition(".")
        layer = self.module.get_submodule(owner)
        if name in self.plan.computed:
            return [(0, self.computed, name)]
        if isinstance(layer, Linear | Embedding) and leaf == layer.format.main:
            source = self.sources[f"{owner}.weight"]
            values = _COLUMN_VALUES if _columns(layer) else PIECE_VALUES
            spans = layer_spans(layer.format, owner, source, self.storage, values)
            pieces = [((last - first) * source.shape[1], self.weight, owner, first, last) for first, last in spans]
            return [(0, self.constants, owner), *pieces]
        if name in self.sources:
            return [(self.sources[name].size, self.in_float, name)]
        return []

    def computed(self, name: str) -> None:
        values = self.plan.computed[name]()
        require_finite(values, name)
        self._write({name: values})

    def constants(self, owner: str) -> None:
        found = constants(self._layer(owner).format, owner, self.storage)
        self._write({f"{owner}.{leaf}": array for leaf, array in found.items()})

    def in_float(self, name: str) -> None:
        self._write({name: self.sources[name].all()})

    def weight(self, owner: str, first: int, last: int) -> None:
        layer, source = self._layer(owner), self.sources[f"{owner}.weight"]
        tensors = layer_rows(layer.format, owner, source, self.storage, first, last)
        turned = _columns(layer)
        self._write({f"{owner}.{leaf}": rows for leaf, rows in tensors.items() if leaf not in turned}, first)
        for leaf in turned:
            with self.file.open("r+b") as stream:
                _write_columns(stream, self.offsets[f"{owner}.{leaf}"], tensors[leaf], first, source.shape[0])

    def _layer(self, owner: str) -> Linear | Embedding:
        layer = self.module.get_submodule(owner)
        assert isinstance(layer, Linear | Embedding)
        return layer

    def _write(self, tensors: Tensors, first: int = 0) -> None:
        """Rows of tensors from `first` on."""
        with self.file.open("r+b") as stream:
            for name, rows in tensors.items():
                stream.seek(self.offsets[name] + (first * rows[0].nbytes if first else 0))
                stream.write(np.ascontiguousarray(rows).data)


def _columns(layer: Linear | Embedding) -> frozenset[str]:
    """The tensors that the layer holds as columns."""
    return layer.format.columns if isinstance(layer, Linear) else frozenset()


def _write_columns(stream: BinaryIO, offset: int, rows_RK: NDArray[Any], first: int, count: int) -> None:
    """Rows [first, first + R) of `count`, as columns of [K, count]."""
    turned = np.empty(rows_RK.shape[::-1], rows_RK.dtype)
    for row in range(0, len(rows_RK), _TURNED):
        turned[:, row : row + _TURNED] = rows_RK[row : row + _TURNED].T
    if turned.shape[1] == count:
        stream.seek(offset)
        stream.write(turned.data)
        return
    for column, values in enumerate(turned):
        stream.seek(offset + (column * count + first) * turned.itemsize)
        stream.write(values.data)
