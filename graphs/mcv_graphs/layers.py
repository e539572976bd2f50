"""The layers every graph is made of: linear, embedding and norms, in full or reduced precision.

A module is made in float; `set_formats` changes the precision of its layers afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs.formats import FLOAT32, Int8Format, LayerFormat, WeightFormat

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


def set_formats(module: nn.Module, formats: Mapping[str, LayerFormat]) -> None:
    """Hold the named linears and embeddings in other formats; what they held is lost."""
    for path, layer_format in formats.items():
        layer = module.get_submodule(path)
        assert isinstance(layer, Linear | Embedding), f"{path} has no format"
        layer.set_format(layer_format)


class Linear(nn.Module):
    """`x @ weight + bias`, [..., in_features] -> [..., out_features]. `quantizable`: whether it may have another format."""

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
        layer_format.register(self)
        if layer_format.smoothed:
            self.register_buffer("input_factors", torch.empty(self.in_features))

    def resize(self, *, in_features: int | None = None, out_features: int | None = None) -> None:
        """Have fewer channels; what the layer held is lost."""
        self.in_features, self.out_features = in_features or self.in_features, out_features or self.out_features
        if self.bias is not None:
            self.bias = nn.Parameter(torch.empty(self.out_features))
        self.set_format(self.format)

    def forward(self, x: Tensor) -> Tensor:
        return self.format.forward(self, x * self.input_factors if self.format.smoothed else x)


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
        self.format = layer_format
        _drop_held(self)
        layer_format.register_table(self)

    def forward(self, indices: Tensor) -> Tensor:
        return self.format.lookup(self, indices)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias; `skip` adds a residual first and returns the sum too."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def skip(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        # Not SkipLayerNormalization: a sum and LayerNormalization took 0.67 ms where it took 3.10 (1,024 x 1,152, two threads).
        total = x + skip
        return self(total), total


class RMSNorm(nn.Module):
    """RMS norm with weight; `skip` adds a residual first and returns the sum too."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def skip(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return ops.skip_rms_norm(x, skip, self.weight, self.eps)


def _drop_held(layer: Linear | Embedding) -> None:
    for name in (*layer._parameters, *layer._buffers):
        if name != "bias":
            delattr(layer, name)
