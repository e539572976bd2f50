"""Weights in 32-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mcv_graphs.formats.layer_format import InputRange, Rounding, Tensors

if TYPE_CHECKING:
    from mcv_graphs.layers import Embedding, Linear


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A linear's weight is held as [in, out], the operand of MatMul.

    Held the other way, the graph would transpose it and the optimizer would fold a second copy of every weight into memory.
    """

    main: ClassVar = "weight"
    columns: ClassVar = frozenset(("weight",))
    quantized: ClassVar = False
    smoothed: ClassVar = False
    static: ClassVar = False
    tolerance: ClassVar = 0.1

    def register(self, layer: Linear) -> None:
        layer.weight = nn.Parameter(torch.empty(layer.in_features, layer.out_features))

    def register_table(self, table: Embedding) -> None:
        table.weight = nn.Parameter(torch.empty(table.rows, table.width))

    def forward(self, layer: Linear, x: Tensor) -> Tensor:
        y = x @ layer.weight
        return y if layer.bias is None else y + layer.bias

    def lookup(self, table: Embedding, indices: Tensor) -> Tensor:
        return F.embedding(indices, table.weight)

    def quantize(self, rows_NK: NDArray[np.float32], rounding: Rounding) -> Tensors:
        return {"weight": rows_NK}

    def constants(self, inputs: InputRange | None) -> Tensors:
        return {}

    def dequantize(self, layer: Linear | Embedding, count: int) -> Tensor:
        return layer.weight[:count] if hasattr(layer, "rows") else layer.weight[:, :count].T


FLOAT32 = FloatFormat()
