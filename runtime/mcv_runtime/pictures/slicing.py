"""Decide how a picture is cut: a thumbnail of the whole and, for a large one, a grid of equal slices.

Source: the published image processors of MiniCPM-V 2.0 to 4.5 (LLaVA-UHD, arXiv:2403.11703). Sizes are (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mcv_runtime.bundle.manifest import ImageSpec
from mcv_runtime.errors import OptionError

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceGrid:
    """The slices of one picture: all of it (`overview`), then `rows` x `columns` cells, row by row; none if it is not cut."""

    overview: Size
    columns: int = 0
    rows: int = 0
    cell: Size = (0, 0)
    cells: tuple[Size, ...] = ()
    """Size of each cell on its own, where they differ."""
    token_unit: int | None = None
    """Side of the square of pixels behind a visual token; None where every slice makes the same number of tokens."""

    @property
    def refined(self) -> Size:
        """Size of the picture that the cells are cut from."""
        return self.cell[0] * self.columns, self.cell[1] * self.rows

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Size of every slice, in order."""
        return (self.overview, *(self.cells or (self.cell,) * (self.columns * self.rows)))

    @property
    def token_shapes(self) -> tuple[tuple[int, int], ...] | None:
        """Rows and columns of the visual tokens of every slice, where they depend on its size."""
        unit = self.token_unit
        return None if unit is None else tuple((height // unit, width // unit) for width, height in self.sizes)


@dataclass(frozen=True, slots=True)
class ClipGrid:
    """The pictures that stand for a video, in order."""

    frames: tuple[SliceGrid, ...]


def adaptive_grid(size: Size, image: ImageSpec, max_slice_nums: int | None = None, token_unit: int | None = None) -> SliceGrid:
    """The grid of at most `max_slice_nums` cells that fits the picture's area and aspect ratio best.

    Sizes come in whole patches, or in whole visual tokens of `token_unit` pixels a side (`aligned_grid`).
    """
    limit = image.max_slice_nums if max_slice_nums is None else max_slice_nums
    if limit < 1:
        raise OptionError(f"max_slice_nums must be at least 1, not {limit}")
    width, height = size
    side, unit = image.scale_resolution, token_unit or image.patch_size
    if image.slicing == "square":
        return SliceGrid(overview=(side, side), token_unit=token_unit)
    wanted = min(math.ceil(width * height / (side * side)), limit)
    if wanted <= 1 or not image.slice_mode:
        return SliceGrid(overview=fit(width, height, side, unit, enlarge=True), token_unit=token_unit)
    columns, rows = _best_shape(math.log(width / height), wanted, limit, upright=image.slicing == "aligned_grid")
    return SliceGrid(
        overview=fit(width, height, side, unit, enlarge=False),
        columns=columns,
        rows=rows,
        cell=fit(_to_unit(width, columns) / columns, _to_unit(height, rows) / rows, side, unit, enlarge=True),
        token_unit=token_unit,
    )


def _best_shape(log_ratio: float, wanted: int, limit: int, *, upright: bool) -> tuple[int, int]:
    """(columns, rows) with the aspect ratio nearest to the picture's; of equals the first, or the one with most rows."""
    shapes = [shape for cells in (wanted - 1, wanted, wanted + 1) if 1 < cells <= limit for shape in _factorisations(cells)]

    def misfit(shape: tuple[int, int]) -> tuple[float, int]:
        return abs(log_ratio - math.log(shape[0] / shape[1])), -shape[1] if upright else 0

    return min(shapes, key=misfit, default=(1, 1))


def _factorisations(cells: int) -> Iterator[tuple[int, int]]:
    return ((columns, cells // columns) for columns in range(1, cells + 1) if cells % columns == 0)


def fit(width: float, height: float, side: int, unit: int, *, enlarge: bool) -> Size:
    """The size of about `side` x `side` pixels in the same aspect ratio, in whole units; smaller ones stay unless `enlarge`."""
    if enlarge or width * height > side * side:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return _to_unit(width, unit), _to_unit(height, unit)


def _to_unit(length: float, unit: int) -> int:
    # Python's round-half-to-even, as in the reference
    return max(round(length / unit) * unit, unit)
