"""Weights as blocks of 8- or 4-bit integers with a scale each; the layer computes in floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs.formats.float32 import FLOAT32
from mcv_graphs.formats.layer_format import InputRange, Rounding, Tensors
from mcv_runtime.errors import OptionError

if TYPE_CHECKING:
    from mcv_graphs.layers import Embedding, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """A row is cut into blocks of `block_size` input channels.

    `symmetric` leaves zero points out; 4 bits need them: half of the 16 levels would go unused in a one-sided block.
    """

    bits: int
    block_size: int = 32
    smoothed: bool = False

    main: ClassVar = "qweight"
    columns: ClassVar = frozenset[str]()
    quantized: ClassVar = True
    static: ClassVar = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(f"bits={self.bits}: blocks have 4 or 8 bits")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise OptionError(f"block_size={self.block_size} is not a power of two of at least 16")

    @property
    def symmetric(self) -> bool:
        return self.bits == 8

    @property
    def tolerance(self) -> float:
        return 0.5 if self.bits == 4 else 0.1

    def blocks(self, width: int) -> int:
        """Blocks in a row of `width` values; the last one may be padded."""
        return -(-width // self.block_size)

    def register(self, layer: Linear) -> None:
        self._register(layer, layer.out_features, layer.in_features)

    def register_table(self, table: Embedding) -> None:
        if table.width % self.block_size:
            if not table.may_stay_float:
                raise OptionError(
                    f"an embedding {table.width} wide cannot be cut into blocks of {self.block_size}; "
                    "choose a smaller block size"
                )
            table.set_format(FLOAT32)
            return
        self._register(table, table.rows, table.width)
        # held flat: GatherBlockQuantized wants a matrix, and a Reshape would copy it
        table.qweight = table.qweight.flatten(1)

    def forward(self, layer: Linear, x: Tensor) -> Tensor:
        held = layer.qweight, layer.scales, layer.zero_points, layer.bias
        return ops.matmul_nbits(x, *held, bits=self.bits, block_size=self.block_size)

    def lookup(self, table: Embedding, indices: Tensor) -> Tensor:
        held = table.scales, table.zero_points
        return ops.gather_block_quantized(table.qweight, indices, *held, bits=self.bits, block_size=self.block_size)

    def quantize(self, rows_NK: NDArray[np.float32], rounding: Rounding) -> Tensors:
        blocks = rounding(rows_NK, self)
        held: dict[str, NDArray[Any]] = {"qweight": blocks.qweight, "scales": blocks.scales}
        return held if blocks.zero_points is None else {**held, "zero_points": blocks.zero_points}

    def constants(self, inputs: InputRange | None) -> Tensors:
        return {}

    def dequantize(self, layer: Linear | Embedding, count: int) -> Tensor:
        scales, zeros = layer.scales[:count], layer.zero_points
        values = layer.qweight[:count].reshape(*scales.shape, -1)
        width = layer.in_features if hasattr(layer, "in_features") else layer.width
        return ops.dequantize(values, scales, None if zeros is None else zeros[:count], self.bits)[:, :width]

    def _register(self, module: nn.Module, rows: int, width: int) -> None:
        blocks = self.blocks(width)
        module.register_buffer("qweight", torch.empty(rows, blocks, self.block_size * self.bits // 8, dtype=torch.uint8))
        module.register_buffer("scales", torch.empty(rows, blocks))
        zero_points = None if self.symmetric else torch.empty(rows, -(-blocks * self.bits // 8), dtype=torch.uint8)
        module.register_buffer("zero_points", zero_points)
