"""Turn a picture into what the vision encoder reads: normalised patches and the number of each patch's position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mcv_runtime.bundle.manifest import ImageSpec
from mcv_runtime.pictures.slicing import SliceGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatchedSlice:
    """One slice, `rows` x `columns` patches in row-major order, perhaps with padding after them."""

    rows: int
    columns: int
    pixel_values: NDArray[np.float32]
    """[patches and padding, 3 * p * p], each patch in C, p, p order."""
    position_ids: NDArray[np.int64]
    """[patches and padding]: index into the tower's position table."""
    table_side: int

    @property
    def patch_positions(self) -> NDArray[np.int64]:
        """[patches, 2]: row and column of each patch."""
        return np.stack(np.divmod(np.arange(self.rows * self.columns), self.columns), axis=1).astype(np.int64)

    @property
    def row_weights(self) -> NDArray[np.float32]:
        """[rows, table side]: resizes the position table."""
        return resize_weights(self.table_side, self.rows)

    @property
    def column_weights(self) -> NDArray[np.float32]:
        """[columns, table side]: resizes the position table."""
        return resize_weights(self.table_side, self.columns)


def cut(picture: Image.Image, grid: SliceGrid) -> Iterator[Image.Image]:
    """The slices of an RGB picture, in order, each resized straight from the original."""
    yield picture.resize(grid.overview, Image.Resampling.BICUBIC)
    if grid.columns:
        refined = picture.resize(grid.refined, Image.Resampling.BICUBIC)
        width, height = grid.cell
        for top in range(0, refined.height, height):
            for left in range(0, refined.width, width):
                yield refined.crop((left, top, left + width, top + height))


def patch_slice(picture: Image.Image, image: ImageSpec, longest: int = 0) -> PatchedSlice:
    """Normalise one RGB slice and cut it into patches; `longest`: the patches of the request's longest slice."""
    rows, columns = picture.height // image.patch_size, picture.width // image.patch_size
    pixel_values = patchify(normalise(np.asarray(picture), image), image.patch_size)
    if image.positions == "strip":
        pixel_values = np.pad(pixel_values, ((0, max(longest - len(pixel_values), 0)), (0, 0)))
        position_ids = bucket(stepped(len(pixel_values)), image.position_table_side)
    elif image.positions == "resized":
        position_ids = np.arange(rows * columns)
    else:
        position_ids = grid_ids(rows, columns, image.position_table_side, divided if image.positions == "divided" else stepped)
    return PatchedSlice(
        rows=rows,
        columns=columns,
        pixel_values=pixel_values,
        position_ids=position_ids,
        table_side=image.position_table_side,
    )


def normalise(pixels_HWC: NDArray[np.uint8], image: ImageSpec) -> NDArray[np.float32]:
    """`(v / 255 - mean) / std` in float32: [H, W, C] -> [C, H, W]."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    channels = zip(image.mean, image.std, strict=True)
    return np.stack([((levels - np.float32(m)) / np.float32(s))[pixels_HWC[..., c]] for c, (m, s) in enumerate(channels)])


def patchify(image_CHW: NDArray[np.float32], patch_size: int) -> NDArray[np.float32]:
    """Cut a normalised image into patches: [C, H, W] -> [H/p * W/p, C*p*p]."""
    channels, height, width = image_CHW.shape
    p = patch_size
    blocks = image_CHW.reshape(channels, height // p, p, width // p, p)
    return np.ascontiguousarray(blocks.transpose(1, 3, 0, 2, 4)).reshape(-1, channels * p * p)


def grid_ids(rows: int, columns: int, table_side: int, coordinates: Callable[[int], NDArray[np.float32]]) -> NDArray[np.int64]:
    """Positions of a `rows` x `columns` slice in a square table: row-major, [rows * columns]."""
    down, across = (bucket(coordinates(count), table_side) for count in (rows, columns))
    return (down[:, None] * table_side + across).reshape(-1)


def bucket(coordinates: NDArray[np.float32], table_side: int) -> NDArray[np.int64]:
    """The entry of a table that each fractional coordinate falls on: 0..table_side - 1.

    Not floor(table_side * coordinate): where that product is whole, the reference depends on how its coordinates and the
    boundaries between entries were rounded.
    """
    step = 1 / table_side
    boundaries = arange(step, step, math.ceil((1 - step) / step))
    return np.searchsorted(boundaries, coordinates, side="right").astype(np.int64)


def stepped(count: int) -> NDArray[np.float32]:
    """The coordinates i / count of `count` patches as the resampler generation has them: `arange(0, 1 - 1e-6, 1 / count)`."""
    return arange(0.0, float(np.float32(1 / count)), count)


def divided(count: int) -> NDArray[np.float32]:
    """The coordinates i / count of `count` patches as the merger generation has them: `arange(count) / count`."""
    return np.arange(count, dtype=np.float32) / np.float32(count)


def arange(start: float, step: float, count: int) -> NDArray[np.float32]:
    """`count` numbers as torch's CPU `arange` rounds them.

    It steps in blocks of 8 floats (AVX2), two blocks at a time: the block's start is rounded to float32 before the offset is
    added in float64; the remainder is rounded once.
    """
    index = np.arange(count)
    block = np.where(index < count // 16 * 16, index // 8 * 8, 0)
    numbers: NDArray[np.float32] = ((start + block * step).astype(np.float32) + (index - block) * step).astype(np.float32)
    return numbers


def resize_weights(size: int, wanted: int) -> NDArray[np.float32]:
    """The matrix [wanted, size] that resizes an axis as torch's antialiased bicubic interpolation does (half-pixel centres).

    Keys' cubic kernel with a = -0.5, stretched when shrinking, each row normalised to 1.
    """
    scale = size / wanted
    centres = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    normalised: NDArray[np.float32] = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return normalised
