"""Pictures of more than 8 bits a channel, and those of less than three channels, as plain RGB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DEPTHS = (10, 12, 14, 16, 20, 24, 32)
Box: TypeAlias = tuple[int, int, int, int]
_BAND_PIXELS = 1 << 20
"""Pixels that are scaled at once: bounds the memory beside the picture's own."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture as RGB. Transparency is dropped, as the published code does; what is deeper than 8 bits is scaled."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip instead of scaling, and a 16-bit picture would come out white
        top = max(float(levels.max(initial=0, where=np.isfinite(levels))) for _, levels in _bands(image))
        # an array of floats is from 0 to 1
        factor = 255.0 if image.mode == "F" and top <= 1 else scale(top)
        result = Image.new("RGB", image.size)
        for box, levels in _bands(image):
            result.paste(Image.fromarray(_scaled(levels, factor)).convert("RGB"), box)
        return result
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns
    return image.convert("RGB")


def scale(top: float) -> float:
    """What makes 0..255 of levels of which `top` is the highest: their depth is the least of 8, 10, 12, 14, 16, ... bits.

    Cameras and scanners write 10, 12 or 14 bits into files of 16, which taken for 16 bits are nearly black.
    """
    if top <= 255:
        return 1.0
    depth = next((depth for depth in _DEPTHS if top < 1 << depth), _DEPTHS[-1])
    return 255 / ((1 << depth) - 1)


def joined(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """RGB of 8 bits from the upper and the lower bytes of 16-bit colours."""
    bands = list(_boxes(upper.size))

    def levels(box: Box) -> NDArray[np.float32]:
        return np.asarray(upper.crop(box), np.float32) * np.float32(256) + np.asarray(lower.crop(box), np.float32)

    factor = scale(max(float(levels(box).max()) for box in bands))
    result = Image.new("RGB", upper.size)
    for box in bands:
        result.paste(Image.fromarray(_scaled(levels(box), factor)), box)
    return result


def _scaled(levels: NDArray[np.float32], factor: float) -> NDArray[np.uint8]:
    scaled: NDArray[np.float32] = np.nan_to_num(levels) * np.float32(factor)
    return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _bands(image: Image.Image) -> Iterator[tuple[Box, NDArray[np.float32]]]:
    for box in _boxes(image.size):
        yield box, np.asarray(image.crop(box)).astype(np.float32)


def _boxes(size: tuple[int, int]) -> Iterator[Box]:
    """A picture in bands of rows: left, upper, right and lower edge of each."""
    width, height = size
    rows = max(_BAND_PIXELS // width, 1)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)
