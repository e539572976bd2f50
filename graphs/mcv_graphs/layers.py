"""The layers every graph is made of: linear, embedding and norms, in full or reduced weight precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcv_graphs import ops
from mcv_runtime.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How a linear's or embedding's weight is stored: 32 bits as float, 8 or 4 as blocks of integers with a scale each.

    `symmetric` leaves zero points out; 4 bits need them: half of the 16 levels would go unused in a one-sided block.
    """

    bits: int = 32
    block_size: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 32):
            raise OptionError(f"bits={self.bits}: weights have 4, 8 or 32 bits")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise OptionError(f"block_size={self.block_size} is not a power of two of at least 16")

    @property
    def quantized(self) -> bool:
        return self.bits < 32

    @property
    def symmetric(self) -> bool:
        return self.bits == 8

    def blocks(self, width: int) -> int:
        """Blocks in a row of `width` values; the last one may be padded."""
        return -(-width // self.block_size)


FLOAT32 = WeightFormat()


class Linear(nn.Module):
    """`x @ weight + bias`, [..., in_features] -> [..., out_features].

    The float weight is held as [in, out], the operand of MatMul: held the other way, the graph would transpose it and
    the optimizer would fold a second copy of every weight into memory.
    """

    weight: Tensor
    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, weights: WeightFormat = FLOAT32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, weights
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        if weights.quantized:
            _register_blocks(self, out_features, in_features, weights)
        else:
            self.weight = nn.Parameter(torch.empty(in_features, out_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.format.quantized:
            return ops.matmul_nbits(
                x,
                self.qweight,
                self.scales,
                self.zero_points,
                self.bias,
                bits=self.format.bits,
                block_size=self.format.block_size,
            )
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """Rows of a table by index, [...] -> [..., width]."""

    weight: Tensor
    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, rows: int, width: int, *, weights: WeightFormat = FLOAT32) -> None:
        super().__init__()
        self.rows, self.width, self.format = rows, width, weights
        if weights.quantized and width % weights.block_size:
            raise OptionError(
                f"an embedding {width} wide cannot be cut into blocks of {weights.block_size}; choose a smaller block size"
            )
        if weights.quantized:
            _register_blocks(self, rows, width, weights)
            self.qweight = self.qweight.flatten(
                1
            )  # held flat: GatherBlockQuantized wants a matrix, and a Reshape would copy it
        else:
            self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, indices: Tensor) -> Tensor:
        if self.format.quantized:
            return ops.gather_block_quantized(
                self.qweight, indices, self.scales, self.zero_points, bits=self.format.bits, block_size=self.format.block_size
            )
        return F.embedding(indices, self.weight)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias; `skip` adds a residual first and returns the sum too."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def skip(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return ops.skip_layer_norm(x, skip, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm with weight; `skip` adds a residual first and returns the sum too."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def skip(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return ops.skip_rms_norm(x, skip, self.weight, self.eps)


def _register_blocks(module: nn.Module, rows: int, width: int, weights: WeightFormat) -> None:
    blocks = weights.blocks(width)
    module.register_buffer("qweight", torch.empty(rows, blocks, weights.block_size * weights.bits // 8, dtype=torch.uint8))
    module.register_buffer("scales", torch.empty(rows, blocks))
    zero_points = None if weights.symmetric else torch.empty(rows, -(-blocks * weights.bits // 8), dtype=torch.uint8)
    module.register_buffer("zero_points", zero_points)
