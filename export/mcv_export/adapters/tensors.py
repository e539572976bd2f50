"""A base's tensor with what adapters add to it, computed for a few rows at a time.

Several adapters are merged one after the other, in the order in which they are given, as PEFT's `merge_and_unload` does: first
what they hold in full, then one LoRA after the other (each DoRA's lengths are those of the base, not of what came before), then
rows of tokens. A weight multiplies a LoRA's scaling; of what is held in full it is the part of the way from the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mcv_export.checkpoint import CheckpointTensor
from mcv_export.tensor_files import matrix_shape

Rows = NDArray[np.float32]
_CHUNK_VALUES = 1 << 22


class Delta(Protocol):
    """What is added to rows of a tensor."""

    def applied(self, values: Rows, original: Rows, first: int, tensor: MergedTensor) -> Rows:
        """Rows from `first` on with it. `values` are they so far, `original` the base's."""


@dataclass(frozen=True, slots=True)
class InFull:
    """A tensor in the place of the base's."""

    tensor: CheckpointTensor
    weight: float


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows in the place of some of the base's."""

    ids: NDArray[np.int64]
    tensor: CheckpointTensor
    weight: float

    def applied(self, values: Rows, original: Rows, first: int, tensor: MergedTensor) -> Rows:
        inside = np.flatnonzero((self.ids >= first) & (self.ids < first + len(values)))
        if not len(inside):
            return values
        at = self.ids[inside] - first
        values = values.copy()
        values[at] = _between(values[at], matrix(self.tensor)[inside], self.weight)
        return values


@dataclass(frozen=True, slots=True)
class LowRank:
    """B [out, r] times A [r, in], or for an embedding [tokens, width] both transposed; a vector `lengths` makes it a DoRA."""

    a: CheckpointTensor
    b: CheckpointTensor
    scaling: float
    lengths: CheckpointTensor | None = None
    embedding: bool = False
    norms: list[Rows] = field(default_factory=list)
    """An embedding's, found when they are first needed."""

    def applied(self, values: Rows, original: Rows, first: int, tensor: MergedTensor) -> Rows:
        delta = self.rows(first, first + len(values))
        if self.lengths is None:
            delta += values
            return delta
        lengths = matrix(self.lengths).reshape(-1)
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # a row of zeros has no direction: what comes of it is not a number
            if self.embedding:
                factors = (lengths / self._column_norms(tensor))[None, :]
            else:
                norms = np.linalg.norm(original + delta, axis=1)
                factors = (lengths[first : first + len(values)] / norms)[:, None]
        delta += values
        delta *= factors
        return delta

    def rows(self, first: int, last: int) -> Rows:
        """Rows of the product."""
        if self.embedding:
            product = matrix(self.a)[:, first:last].T @ matrix(self.b).T
        else:
            product = matrix(self.b, first, last) @ matrix(self.a)
        product *= np.float32(self.scaling)
        return product

    def _column_norms(self, tensor: MergedTensor) -> Rows:
        if not self.norms:
            rows, columns = matrix_shape(tensor.shape)
            squares = np.zeros(columns)
            step = max(_CHUNK_VALUES // columns, 1)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                squares += ((tensor.original(first, last) + self.rows(first, last)).astype(np.float64) ** 2).sum(0)
            self.norms.append(np.sqrt(squares).astype(np.float32))
        return self.norms[0]


@dataclass(frozen=True, slots=True)
class Bias:
    """What a LoRA adds to its layer's bias."""

    tensor: CheckpointTensor
    scaling: float

    def applied(self, values: Rows, original: Rows, first: int, tensor: MergedTensor) -> Rows:
        return values + np.float32(self.scaling) * self.tensor.rows(first, first + len(values))


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor of a checkpoint with adapters."""

    base: CheckpointTensor
    full: InFull | None
    deltas: Sequence[Delta]

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def original(self, first: int, last: int) -> Rows:
        """Rows without what is added to them."""
        if self.full is None:
            return self.base.rows(first, last)
        rows = self.full.tensor.rows(first, last)
        return rows if self.full.weight == 1 else _between(self.base.rows(first, last), rows, self.full.weight)

    def rows(self, first: int, last: int) -> Rows:
        """Rows [first, last) as float32, the tensor taken as a matrix: [last - first, columns]."""
        original = values = self.original(first, last)
        for delta in self.deltas:
            values = delta.applied(values, original, first, self)
        return values


def matrix(tensor: CheckpointTensor, first: int = 0, last: int | None = None) -> Rows:
    """Rows of a tensor with all axes but the first flattened, also where the first is 1."""
    rows, columns = tensor.shape[0], int(np.prod(tensor.shape[1:]))
    last = rows if last is None else last
    if matrix_shape(tensor.shape) == (rows, columns):
        return tensor.rows(first, last)
    return tensor.rows(0, matrix_shape(tensor.shape)[0]).reshape(rows, columns)[first:last]


def same_values(one: CheckpointTensor, other: CheckpointTensor) -> bool:
    """Whether two tensors are equal, read a few rows at a time."""
    if one.shape != other.shape:
        return False
    rows, columns = matrix_shape(one.shape)
    step = max(_CHUNK_VALUES // columns, 1)
    spans = ((first, min(first + step, rows)) for first in range(0, rows, step))
    return all(np.array_equal(one.rows(*span), other.rows(*span)) for span in spans)


def _between(base: Rows, other: Rows, weight: float) -> Rows:
    return other if weight == 1 else base + np.float32(weight) * (other - base)
