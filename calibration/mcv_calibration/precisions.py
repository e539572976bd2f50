"""Every precision by its name, and what differs between them.

Another one is a file with its format (`mcv_graphs.formats.LayerFormat`) and its `PrecisionSpec`, and a line in `PRECISIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from mcv_calibration.target import Target

if TYPE_CHECKING:
    import onnx

    from mcv_graphs.formats import Activations, LayerFormat

# Formats are torch's business, which takes seconds to import: they are imported when a layer gets one.

_LEAST_BLOCK = 32
Precision: TypeAlias = str
"""A key of `PRECISIONS`."""
Makers: TypeAlias = "Mapping[str, onnx.NodeProto]"
"""The node that makes each tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionSpec:
    """One precision."""

    name: Precision
    suffix: str
    """What a graph's file name ends in."""
    higher: Precision | None
    """What costly layers are raised to."""
    layer: Callable[[int, Target], LayerFormat]
    """The format of a layer, by block size and target."""
    table: Precision | None = None
    """What an embedding has in its place."""
    block_size: int = 0
    """Of weights that are cut into blocks, for which there are sizes and methods, where a recipe says nothing of it; else 0."""
    in_int8: bool = False
    """Whether 8-bit integers are multiplied, for which processors differ."""
    static: bool = False
    """Whether samples must show the range of a layer's input."""
    operators: Mapping[str, int]
    """Operators that read a layer's weight, and as which input."""
    tells: Callable[[onnx.NodeProto, Makers], bool] = field(default=lambda node, makers: True)
    """Whether such a node is of this precision, where others have the operator too."""

    def usual_block(self, *tables: int) -> int:
        """The usual size of blocks, or less where that cuts the rows of tables of these widths evenly, as it must."""
        return max(math.gcd(self.block_size, *tables), _LEAST_BLOCK)


def _float32(block_size: int, target: Target) -> LayerFormat:
    from mcv_graphs.formats import FLOAT32

    return FLOAT32


def _blocks(bits: int, higher: Precision, block_size: int) -> PrecisionSpec:
    def layer(size: int, target: Target) -> LayerFormat:
        from mcv_graphs.formats import WeightFormat

        return WeightFormat(bits=bits, block_size=size)

    return PrecisionSpec(
        name=f"q{bits}",
        suffix=f"_q{bits}",
        higher=higher,
        layer=layer,
        block_size=block_size,
        operators={"MatMulNBits": 1, "GatherBlockQuantized": 0},
        tells=lambda node, makers: any(each.name == "bits" and each.i == bits for each in node.attribute),
    )


def _int8(
    activations: Activations, suffix: str, operator: str, tells: Callable[[onnx.NodeProto, Makers], bool]
) -> PrecisionSpec:
    def layer(block_size: int, target: Target) -> LayerFormat:
        """Unsigned activations on x86, where its fast kernels want them; 7-bit weights where 16-bit sums could overflow.

        The operator for dynamic activations takes unsigned ones everywhere.
        """
        from mcv_graphs.formats import Int8Format

        signed = target == "arm64" and activations != "dynamic"
        return Int8Format(activations=activations, signed=signed, reduce_range=target == "avx2")

    return PrecisionSpec(
        name=f"int8-{activations}",
        suffix=suffix,
        higher="q8",
        layer=layer,
        table="q8",
        in_int8=True,
        static=activations == "static",
        operators={operator: 1},
        tells=tells,
    )


def rounds_rows(node: onnx.NodeProto, makers: Makers) -> bool:
    """Whether each row of a product of 8-bit integers has a scale of its own, by which it is multiplied after it."""
    quantize = makers.get(node.input[0]) if node.op_type == "MatMulIntegerToFloat" else None
    return quantize is not None and any(each.name == "axis" and each.i == 0 for each in quantize.attribute)


PRECISIONS: dict[Precision, PrecisionSpec] = {
    spec.name: spec
    for spec in (
        PrecisionSpec(name="fp32", suffix="", higher=None, layer=_float32, operators={"MatMul": 1, "Gemm": 1, "Gather": 0}),
        _blocks(8, "fp32", 32),
        _blocks(4, "q8", 128),
        _int8("static", "_int8", "MatMulIntegerToFloat", lambda node, makers: not rounds_rows(node, makers)),
        _int8("dynamic", "_int8_dynamic", "DynamicQuantizeMatMul", lambda node, makers: True),
        _int8("token", "_int8_token", "MatMulIntegerToFloat", rounds_rows),
    )
}
