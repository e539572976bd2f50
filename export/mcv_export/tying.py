"""Whether a checkpoint's output head is its token table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mcv_export import config as cfg
from mcv_export.checkpoint import Checkpoint

_CHUNK_VALUES = 1 << 22


class _Tensor(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, first: int, last: int) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class TableAndHead:
    """The names of two tensors, which may be one."""

    table: str
    head: str

    @property
    def tied(self) -> bool:
        return self.table == self.head


def table_and_head(checkpoint: Checkpoint, config: Mapping[str, Any], table: str, head: str, *, tied: bool) -> TableAndHead:
    """What the tensors `table` and `head` are in this checkpoint; `tied` is what a config without tie_word_embeddings means.

    As transformers 5.24 loads them: where config says tied, one that is missing is the other, but a head that differs from the
    table stays (trained adapters and some savers leave the flag as it was). Both are read where both are there.
    """
    if not cfg.flag(config, "tie_word_embeddings", tied):
        return TableAndHead(table, head)
    if table not in checkpoint.tensors and head in checkpoint.tensors:
        return TableAndHead(head, head)
    if head in checkpoint.tensors and not _equal(checkpoint.tensors[table], checkpoint.tensors[head]):
        return TableAndHead(table, head)
    return TableAndHead(table, table)


def _equal(one: _Tensor, other: _Tensor) -> bool:
    if one.shape != other.shape or len(one.shape) != 2 or {_dtype(one), _dtype(other)} - {"F32", "F16", "BF16"}:
        return False  # what is wrong with a head that cannot be read is said where it is used
    rows, columns = one.shape
    step = max(_CHUNK_VALUES // max(columns, 1), 1)
    spans = ((first, min(first + step, rows)) for first in range(0, rows, step))
    return all(np.array_equal(one.rows(*span), other.rows(*span)) for span in spans)


def _dtype(tensor: _Tensor) -> str:
    """Of a safetensors file; a torch file has been looked at when it was mapped."""
    return getattr(tensor, "dtype", "F32")
