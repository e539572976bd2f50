"""What calibration finds out about one graph and the weight writer applies, by the path of a layer or block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mcv_calibration.blocks import Blocks
from mcv_runtime.errors import OptionError


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a tensor's 256 levels cover; zero is among them."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= 0 <= self.high:
            raise OptionError(f"the range {self.low} to {self.high} does not contain zero")

    def steps(self, *, signed: bool) -> tuple[np.float32, int]:
        """Scale and zero point of 256 levels, from -128 or from 0 on."""
        scale = np.float32((self.high - self.low) / 255) or np.float32(1)
        zero = min(max(round(float(-self.low / scale)), 0), 255)
        return scale, zero - 128 if signed else zero


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Of one graph, everything in terms of the channels that are kept."""

    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Of a layer's input, as smoothed."""
    smoothing: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Factors s [in] of a layer: its input is divided by them, its weight's columns are multiplied by them."""
    kept: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    """The feed-forward channels of a block that are kept, ascending."""
    blocks: Mapping[str, Blocks] = field(default_factory=dict)
    """A layer's weight, quantized already."""

    def __post_init__(self) -> None:
        for path, factors in self.smoothing.items():
            if factors.ndim != 1 or not (np.isfinite(factors) & (factors > 0)).all():
                raise OptionError(f"the smoothing of {path} is not a vector of positive numbers")
        for path, channels in self.kept.items():
            if channels.ndim != 1 or not len(channels) or channels[0] < 0 or not (np.diff(channels) > 0).all():
                raise OptionError(f"the channels kept of {path} do not ascend")


NOTHING = Measured()
