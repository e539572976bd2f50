"""How a layer's weight is stored, and in what numbers the layer computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from mcv_runtime.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How a linear's or embedding's weight is stored: 32 bits as float, 8 or 4 as blocks of integers with a scale each.

    `symmetric` leaves zero points out; 4 bits need them: half of the 16 levels would go unused in a one-sided block.
    `smoothed`: a linear's input is multiplied by a factor for each channel first.
    """

    bits: int = 32
    block_size: int = 32
    smoothed: bool = False

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


Activations = Literal["static", "dynamic", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Format:
    """A linear that multiplies 8-bit integers: its weight has a scale for each output channel, its input for all or each row.

    `activations`: the input's range is measured beforehand (`static`), in each call (`dynamic`), or in each call for every row,
    a token or a patch, by itself (`token`): then one of far larger values takes no levels from the others. `signed`: the
    input is int8 rather than uint8. `reduce_range`: weights stay within 64, so that older processors' 16-bit sums do not
    overflow. `smoothed`: the input is multiplied by a factor for each channel first.
    """

    activations: Activations
    signed: bool = False
    reduce_range: bool = False
    smoothed: bool = False

    def __post_init__(self) -> None:
        if self.signed and self.activations == "dynamic":
            raise OptionError("dynamic activations are uint8: the operator knows no other")

    @property
    def quantized(self) -> bool:
        return True

    @property
    def largest(self) -> int:
        """The largest absolute value of a weight."""
        return 64 if self.reduce_range else 127


LayerFormat: TypeAlias = WeightFormat | Int8Format

FLOAT32 = WeightFormat()
