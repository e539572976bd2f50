"""Products of 8-bit integers: a weight has a scale for each output channel, the input one for all or for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcv_graphs import int8_ops
from mcv_graphs.formats.layer_format import InputRange, Rounding, Tensors
from mcv_runtime.errors import OptionError

if TYPE_CHECKING:
    from mcv_graphs.layers import Embedding, Linear

Activations = Literal["static", "dynamic", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Format:
    """`activations`: when the input's range is found.

    Beforehand (`static`), in each call (`dynamic`), or in each call for every row, a token or a patch, by itself (`token`):
    then one of far larger values takes no levels from the others. `signed`: the input is int8 rather than uint8.
    `reduce_range`: weights stay within 64, so that older processors' 16-bit sums do not overflow.
    """

    activations: Activations
    signed: bool = False
    reduce_range: bool = False
    smoothed: bool = False

    main: ClassVar = "qweight"
    columns: ClassVar = frozenset(("qweight",))
    quantized: ClassVar = True
    tolerance: ClassVar = 0.1

    def __post_init__(self) -> None:
        if self.signed and self.activations == "dynamic":
            raise OptionError("dynamic activations are uint8: the operator knows no other")

    @property
    def static(self) -> bool:
        return self.activations == "static"

    @property
    def largest(self) -> int:
        """The largest absolute value of a weight."""
        return 64 if self.reduce_range else 127

    def register(self, layer: Linear) -> None:
        layer.register_buffer("qweight", torch.empty(layer.in_features, layer.out_features, dtype=torch.int8))
        layer.register_buffer("weight_scales", torch.empty(layer.out_features))
        if self.static:
            layer.register_buffer("input_scale", torch.empty(()))
            layer.register_buffer("input_zero_point", torch.empty((), dtype=torch.int8 if self.signed else torch.uint8))

    def register_table(self, table: Embedding) -> None:
        raise OptionError("an embedding multiplies nothing, so it has no int8 format; give it q8")

    def forward(self, layer: Linear, x: Tensor) -> Tensor:
        held = layer.qweight, layer.weight_scales
        if self.activations == "dynamic":
            return int8_ops.dynamic_matmul(x, *held, layer.bias)
        if self.activations == "token":
            return int8_ops.token_matmul(x, *held, layer.bias, signed=self.signed)
        return int8_ops.static_matmul(x, *held, layer.input_scale, layer.input_zero_point, layer.bias)

    def lookup(self, table: Embedding, indices: Tensor) -> Tensor:
        raise NotImplementedError

    def quantize(self, rows_NK: NDArray[np.float32], rounding: Rounding) -> Tensors:
        """Symmetric, whatever the rounding of blocks."""
        scales = np.maximum(rows_NK.max(1), -rows_NK.min(1)) / np.float32(self.largest)
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
        rows_NK *= inverse[:, None]
        np.rint(rows_NK, out=rows_NK)
        np.clip(rows_NK, -self.largest, self.largest, out=rows_NK)
        return {"qweight": rows_NK.astype(np.int8), "weight_scales": scales}

    def constants(self, inputs: InputRange | None) -> Tensors:
        if inputs is None:
            return {}
        scale, zero = inputs.steps(signed=self.signed)
        return {"input_scale": np.array(scale), "input_zero_point": np.array(zero, np.int8 if self.signed else np.uint8)}

    def dequantize(self, layer: Linear | Embedding, count: int) -> Tensor:
        scales = cast("Linear", layer).weight_scales
        return (layer.qweight[:, :count].float() * scales[:count]).T
