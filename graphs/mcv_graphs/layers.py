"""The layers every graph is made of: linear, embedding and norms, in full or reduced precision.

A module is made in float; `set_formats` changes the precision of its layers afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcv_graphs import int8_ops, ops
from mcv_graphs.formats import FLOAT32, Int8Format, LayerFormat, WeightFormat
from mcv_runtime.errors import OptionError

__all__ = [
    "FLOAT32",
    "Embedding",
    "FeedForward",
    "Int8Format",
    "LayerFormat",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "WeightFormat",
    "set_formats",
]

FeedForward: TypeAlias = tuple[tuple[str, ...], str]
"""A block's `FFN`: the linears that make its inner channels, and the one that reads them."""

_HELD = (
    "weight", "qweight", "scales", "zero_points", "weight_scales", "input_scale", "input_zero_point", "input_factors",
)  # fmt: skip
"""What a layer's weight may consist of."""


def set_formats(module: nn.Module, formats: Mapping[str, LayerFormat]) -> None:
    """Hold the named linears and embeddings in other formats; what they held is lost."""
    for path, layer_format in formats.items():
        layer = module.get_submodule(path)
        assert isinstance(layer, Linear | Embedding), f"{path} has no format"
        layer.set_format(layer_format)


class Linear(nn.Module):
    """`x @ weight + bias`, [..., in_features] -> [..., out_features].

    The float weight is held as [in, out], the operand of MatMul: held the other way, the graph would transpose it and
    the optimizer would fold a second copy of every weight into memory. `quantizable`: whether it may have another format.
    """

    weight: Tensor
    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None
    weight_scales: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_factors: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, quantizable: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.quantizable = in_features, out_features, quantizable
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.set_format(FLOAT32)

    def set_format(self, layer_format: LayerFormat) -> None:
        """Hold the weight in this format; what it held is lost."""
        self.format = layer_format
        _drop_held(self)
        if isinstance(layer_format, Int8Format):
            self._register_int8(layer_format)
        elif layer_format.quantized:
            _register_blocks(self, self.out_features, self.in_features, layer_format)
        else:
            self.weight = nn.Parameter(torch.empty(self.in_features, self.out_features))
        if layer_format.smoothed:
            self.register_buffer("input_factors", torch.empty(self.in_features))

    def resize(self, *, in_features: int | None = None, out_features: int | None = None) -> None:
        """Have fewer channels; what the layer held is lost."""
        self.in_features, self.out_features = in_features or self.in_features, out_features or self.out_features
        if self.bias is not None:
            self.bias = nn.Parameter(torch.empty(self.out_features))
        self.set_format(self.format)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.format
        x = x * self.input_factors if kind.smoothed else x
        if isinstance(kind, Int8Format):
            if kind.activations == "dynamic":
                return int8_ops.dynamic_matmul(x, self.qweight, self.weight_scales, self.bias)
            matmul = int8_ops.token_matmul if kind.activations == "token" else int8_ops.static_matmul
            return matmul(x, self.qweight, self.weight_scales, self.input_scale, self.input_zero_point, self.bias)
        if kind.quantized:
            held = self.qweight, self.scales, self.zero_points, self.bias
            return ops.matmul_nbits(x, *held, bits=kind.bits, block_size=kind.block_size)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def _register_int8(self, kind: Int8Format) -> None:
        self.register_buffer("qweight", torch.empty(self.in_features, self.out_features, dtype=torch.int8))
        self.register_buffer("weight_scales", torch.empty(self.out_features))
        if kind.activations != "dynamic":
            self.register_buffer("input_scale", torch.empty(()))
            self.register_buffer("input_zero_point", torch.empty((), dtype=torch.int8 if kind.signed else torch.uint8))


class Embedding(nn.Module):
    """Rows of a table by index, [...] -> [..., width].

    `may_stay_float`: where the width cannot be cut into blocks, rather than being an error.
    """

    weight: Tensor
    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, rows: int, width: int, *, quantizable: bool = True, may_stay_float: bool = False) -> None:
        super().__init__()
        self.rows, self.width, self.quantizable, self.may_stay_float = rows, width, quantizable, may_stay_float
        self.set_format(FLOAT32)

    def set_format(self, layer_format: LayerFormat) -> None:
        """Hold the table in this format; what it held is lost."""
        if isinstance(layer_format, Int8Format):
            raise OptionError("an embedding multiplies nothing, so it has no int8 format; give it q8")
        if layer_format.quantized and self.width % layer_format.block_size:
            if not self.may_stay_float:
                raise OptionError(
                    f"an embedding {self.width} wide cannot be cut into blocks of {layer_format.block_size}; "
                    "choose a smaller block size"
                )
            layer_format = FLOAT32
        self.format: WeightFormat = layer_format
        _drop_held(self)
        if layer_format.quantized:
            _register_blocks(self, self.rows, self.width, layer_format)
            # held flat: GatherBlockQuantized wants a matrix, and a Reshape would copy it
            self.qweight = self.qweight.flatten(1)
        else:
            self.weight = nn.Parameter(torch.empty(self.rows, self.width))

    def forward(self, indices: Tensor) -> Tensor:
        if self.format.quantized:
            held = self.scales, self.zero_points
            bits, block_size = self.format.bits, self.format.block_size
            return ops.gather_block_quantized(self.qweight, indices, *held, bits=bits, block_size=block_size)
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


def _drop_held(module: nn.Module) -> None:
    for name in _HELD:
        if name in module._parameters or name in module._buffers:
            delattr(module, name)


def _register_blocks(module: nn.Module, rows: int, width: int, weights: WeightFormat) -> None:
    blocks = weights.blocks(width)
    module.register_buffer("qweight", torch.empty(rows, blocks, weights.block_size * weights.bits // 8, dtype=torch.uint8))
    module.register_buffer("scales", torch.empty(rows, blocks))
    zero_points = None if weights.symmetric else torch.empty(rows, -(-blocks * weights.bits // 8), dtype=torch.uint8)
    module.register_buffer("zero_points", zero_points)
