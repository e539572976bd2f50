"""Where each weight of a graph comes from: rows put together from a checkpoint's tensors, and what calibration does to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mcv_calibration.measured import Measured
from mcv_export.checkpoint import Checkpoint, CheckpointTensor, require_floats
from mcv_export.plan import GraphPlan, Part, Transform
from mcv_export.storage import IN_FLOAT, Storage, common_factors, feed_forward
from mcv_export.tensor_files import matrix_shape
from mcv_graphs.folds import Fold, folds
from mcv_graphs.layers import Embedding, Linear
from mcv_runtime.errors import CheckpointError, OptionError

PIECE_VALUES = 1 << 20
"""Float values that a thread holds at once (4 MB: about what a processor's caches hold); quantizing needs a few times that."""

_TRANSFORMS: dict[Transform, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "plus_one": lambda values: values + np.float32(1),
    "negative_exp": lambda values: -np.exp(values),
}


def require_finite(values: NDArray[Any], what: str) -> None:
    """Raise `CheckpointError` for NaN and infinity, with which a model answers nothing: damage, or a merge in fp16."""
    if not np.isfinite(values).all():
        kind = "NaN" if np.isnan(values).any() else "infinite values"
        raise CheckpointError(f"{what} has {kind}; download it again, or merge or train it again in bf16 or fp32")


@dataclass(frozen=True, slots=True)
class Source:
    """A weight [rows, columns] put together from checkpoint tensors; a vector has one column.

    Of what they hold, the kept rows and columns remain, multiplied by the factors of each.
    """

    shape: tuple[int, int]
    parts: tuple[tuple[Part, CheckpointTensor, int], ...]  # the last is the part's number of rows
    kept_rows: NDArray[np.int64] | None = None
    kept_columns: NDArray[np.int64] | None = None
    row_factors: NDArray[np.float32] | None = None
    column_factors: NDArray[np.float32] | None = None

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) as float32, the caller's own to change."""
        if self.kept_rows is None:
            values = self._stored(first, last)
        else:
            kept = self.kept_rows[first:last]
            values = self._stored(int(kept[0]), int(kept[-1]) + 1)[kept - kept[0]]
        if self.kept_columns is not None:
            values = values[:, self.kept_columns]
        if self.row_factors is not None:
            values *= self.row_factors[first:last, None]
        if self.column_factors is not None:
            values *= self.column_factors
        return values

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def all(self) -> NDArray[np.float32]:
        """Every row."""
        return self.rows(0, self.shape[0])

    def spans(self, values: int = PIECE_VALUES) -> list[tuple[int, int]]:
        """[first, last) of pieces of rows, in order, that hold about so many values each."""
        step = max(values // self.shape[1], 1)
        return [(first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step)]

    def pieces(self) -> Iterator[NDArray[np.float32]]:
        """All rows in order, some at a time."""
        return (self.rows(*span) for span in self.spans())

    def _stored(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows as the checkpoint has them."""
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
                if part.scale != 1:
                    rows *= np.float32(part.scale)
                require_finite(rows, f"tensor {part.tensor}")
                pieces.append(rows)
            start += count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def resolve(plan: GraphPlan, checkpoint: Checkpoint, storage: Storage = IN_FLOAT) -> dict[str, Source]:
    """Where each parameter comes from; raises `CheckpointError` for a tensor that is missing or of another shape."""
    with torch.device("meta"):
        module = plan.module()
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
            require_floats(tensor)
            parts.append((part, tensor, count))
        sources[name] = Source((rows, columns), tuple(parts))
    return _adjusted(sources, module, storage.measured)


def _adjusted(sources: dict[str, Source], module: nn.Module, measured: Measured) -> dict[str, Source]:
    """The sources without the channels that are left out, and smoothed: a channel's maker gives less, its reader takes more."""
    for path, channels in measured.kept.items():
        inner, outer = feed_forward(module, path)
        weight = sources[f"{outer}.weight"]
        if channels[-1] >= weight.shape[1]:
            raise OptionError(f"{path} has {weight.shape[1]} feed-forward channels, none with the number {channels[-1]}")
        sources[f"{outer}.weight"] = replace(weight, shape=(weight.shape[0], len(channels)), kept_columns=channels)
        for name in (f"{layer}.{kind}" for layer in inner for kind in ("weight", "bias")):
            if name in sources:
                one = sources[name]
                sources[name] = replace(one, shape=(len(channels), one.shape[1]), kept_rows=channels)
    smoothed = dict(measured.smoothing)
    for fold in folds(module):
        factors = common_factors(measured, fold.readers) if fold.free else None
        if factors is not None:
            for name in (f"{fold.maker}.weight", f"{fold.maker}.bias", fold.maker):
                if name in sources:
                    sources[name] = _divided(sources[name], fold, factors)
            smoothed |= dict.fromkeys(fold.readers, factors)
    for path, factors in smoothed.items():
        weight = sources[f"{path}.weight"]
        if len(factors) != weight.shape[1]:
            raise OptionError(f"the smoothing of {path} is for {len(factors)} channels, it has {weight.shape[1]}")
        sources[f"{path}.weight"] = replace(weight, column_factors=factors)
    return sources


def _divided(maker: Source, fold: Fold, factors: NDArray[np.float32]) -> Source:
    """What makes the channels that are smoothed, giving less of each."""
    channels = np.arange(len(factors)) if fold.channels is None else np.array(fold.channels)
    if len(channels) != len(factors) or channels.max() >= maker.shape[0]:
        raise OptionError(f"the smoothing of {fold.readers[0]} is for {len(factors)} channels, which {fold.maker} has not")
    inverse = np.ones(maker.shape[0], np.float32)
    inverse[channels] = np.reciprocal(factors)
    if not np.array_equal(inverse[channels], np.reciprocal(factors)):
        raise OptionError(f"the smoothing of {fold.readers[0]} differs where it reads the same channel of {fold.maker}")
    return replace(maker, row_factors=inverse if maker.row_factors is None else maker.row_factors * inverse)


def _parameter_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of each parameter as the checkpoint has it, by name; a vector has one column."""
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
