"""What every format of a layer can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from mcv_graphs.layers import Embedding, Linear

Tensors: TypeAlias = Mapping[str, NDArray[Any]]
"""By their name in the layer."""


class Blocks(Protocol):
    """Rows of a weight as integers in blocks, in the layout of `ops.matmul_nbits`."""

    @property
    def qweight(self) -> NDArray[np.uint8]: ...

    @property
    def scales(self) -> NDArray[np.float32]: ...

    @property
    def zero_points(self) -> NDArray[np.uint8] | None: ...


Rounding: TypeAlias = "Callable[[NDArray[np.float32], Any], Blocks]"
"""How blocks are found: rows [N, K] and the format to the blocks."""


class InputRange(Protocol):
    """The values that a layer's input takes."""

    def steps(self, *, signed: bool) -> tuple[np.float32, int]:
        """Scale and zero point of 256 levels, from -128 or from 0 on."""
        ...


class LayerFormat(Protocol):
    """How a linear or an embedding holds its weight, and computes with it. Formats are data, and equal if their fields are."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    main: ClassVar[str]
    """The tensor that holds the weight's values."""
    columns: ClassVar[frozenset[str]]
    """Tensors that a linear holds as [in, out]; all others have a row for each output channel, but for `constants`."""

    @property
    def quantized(self) -> bool: ...

    @property
    def smoothed(self) -> bool:
        """Whether a linear's input is multiplied by a factor for each channel first."""
        ...

    @property
    def static(self) -> bool:
        """Whether the range of a linear's input must be known beforehand."""
        ...

    @property
    def tolerance(self) -> float:
        """Of a rounded weight, the relative error: far above what is sound, far below another weight's, which is 1 and more."""
        ...

    def register(self, layer: Linear) -> None:
        """Have a linear hold empty tensors of this format."""
        ...

    def register_table(self, table: Embedding) -> None:
        """Have an embedding hold them; raises `OptionError` where it cannot."""
        ...

    def forward(self, layer: Linear, x: Tensor) -> Tensor:
        """`x @ weight + bias`, [..., in] -> [..., out]."""
        ...

    def lookup(self, table: Embedding, indices: Tensor) -> Tensor:
        """Rows of a table, [...] -> [..., width]."""
        ...

    def quantize(self, rows_NK: NDArray[np.float32], rounding: Rounding) -> Tensors:
        """The tensors of rows of a weight, all with a row for each; may use up `rows_NK`. Blocks are found by `rounding`."""
        ...

    def constants(self, inputs: InputRange | None) -> Tensors:
        """What a linear has beside its weight."""
        ...

    def dequantize(self, layer: Linear | Embedding, count: int) -> Tensor:
        """The first output channels of a layer's weight as floats: [count, in]."""
        ...
