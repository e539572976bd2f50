"""Decide whether a small picture is worth enlarging, from the size of the text in it.

Source: `small_image_upsize` of the published `minicpm_ocr` of transformers, which measures with OpenCV; here it is numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mcv_runtime.bundle.manifest import ImageSpec
from mcv_runtime.pictures.slicing import Size, SliceGrid, fit

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALL_FONT = 12.0
"""Pixels; taller text is legible as it is."""
_DENSE = 2.0
"""Glyphs per 1000 pixels; less is no page of text."""
_TINY_AREA, _TINY_SIDE = 6272, 84
_EPSILON = float(np.finfo(np.float32).eps)


def keep_small(
    picture: Image.Image, grid: SliceGrid, slices: Sequence[Image.Image], image: ImageSpec, *, adaptive: bool
) -> tuple[SliceGrid, Sequence[Image.Image]]:
    """A picture's grid and slices again, with those that were enlarged for nothing at a size nearer to their own.

    A picture in one piece is not enlarged, or (`adaptive`) only as far as the text in it asks for; of one that is cut,
    `adaptive` looks at each cell, and the overview stays.
    """
    side, unit = image.scale_resolution, grid.token_unit or image.patch_size

    def wanted(piece: Image.Image) -> tuple[bool, Size]:
        """Whether the piece deserves full size, and the size it gets otherwise."""
        resolution = adaptive_resolution(np.asarray(piece), side) if adaptive else None
        return resolution == side, fit(*piece.size, resolution or side, unit, enlarge=resolution is not None)

    if not grid.columns:
        size = wanted(picture)[1]
        return replace(grid, overview=size), (picture.resize(size, Image.Resampling.BICUBIC),)
    if not adaptive:  # cells keep their full size: the reference looks into them only to decide
        return grid, slices
    kept = list(slices)
    for index in range(grid.rows * grid.columns):
        row, column = divmod(index, grid.columns)
        left, right = (round(picture.width * edge / grid.columns) for edge in (column, column + 1))
        top, bottom = (round(picture.height * edge / grid.rows) for edge in (row, row + 1))
        if not 0 < (right - left) * (bottom - top) <= side * side:
            continue
        piece = picture.crop((left, top, right, bottom))
        full, size = wanted(piece)
        if not full and size[0] * size[1] < grid.cell[0] * grid.cell[1]:
            kept[1 + index] = piece.resize(size, Image.Resampling.BICUBIC)
    return replace(grid, cells=tuple(piece.size for piece in kept[1:])), kept


def smallest(size: Size, grid: SliceGrid, image: ImageSpec, *, adaptive: bool) -> SliceGrid:
    """The grid that `keep_small` gives a picture without small text, in which the least is enlarged."""
    side, unit = image.scale_resolution, grid.token_unit or image.patch_size
    if not grid.columns:
        return replace(grid, overview=fit(*size, side, unit, enlarge=False))
    if not adaptive:
        return grid
    cell = fit(size[0] // grid.columns, size[1] // grid.rows, side, unit, enlarge=False)
    return replace(grid, cells=(min(cell, grid.cell, key=math.prod),) * (grid.columns * grid.rows))


@dataclass(frozen=True, slots=True)
class TextMeasure:
    """The usual height of a glyph in pixels, 0 if there is none, and glyphs per 1000 pixels."""

    height: float
    density: float


def adaptive_resolution(pixels_HWC: NDArray[np.uint8], scale_resolution: int) -> int | None:
    """Side of the square whose area a small picture shall fill; None: leave it as it is."""
    height, width = pixels_HWC.shape[:2]
    text = measure_text(pixels_HWC)
    if 0 < text.height <= _SMALL_FONT and text.density >= _DENSE:
        return scale_resolution
    return _TINY_SIDE if height * width < _TINY_AREA else None


def measure_text(pixels_HWC: NDArray[np.uint8]) -> TextMeasure:
    """Take connected spots of ink for glyphs, but for specks, lines and frames."""
    gray = to_gray(pixels_HWC)
    ink = gray <= otsu_threshold(gray)
    if ink.mean() > 0.5:
        ink = ~ink
    height, width = ink.shape
    spots = connected_components(ink)
    is_glyph = (spots.areas >= 3) & (spots.heights >= 2) & (spots.widths < 0.9 * width) & (spots.heights < 0.9 * height)
    count = int(is_glyph.sum())
    return TextMeasure(float(np.median(spots.heights[is_glyph])) if count else 0.0, count * 1000 / (width * height))


def to_gray(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma (ITU-R 601) in 16-bit fixed point: [H, W, 3] -> [H, W]."""
    red, green, blue = (pixels_HWC[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def otsu_threshold(gray: NDArray[np.uint8]) -> int:
    """The level that separates dark from light with the largest variance between them; the darkest of equals (Otsu 1979)."""
    share = np.bincount(gray.reshape(-1), minlength=256) / gray.size
    overall = float((np.arange(256) * share).sum())
    below = mean_below = best_variance = 0.0
    best = 0
    for level in range(256):
        mean_below *= below
        below += float(share[level])
        above = 1.0 - below
        if min(below, above) < _EPSILON:
            continue
        mean_below = (mean_below + level * float(share[level])) / below
        mean_above = (overall - below * mean_below) / above
        variance = below * above * (mean_below - mean_above) ** 2
        if variance > best_variance:
            best_variance, best = variance, level
    return best


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """Area and bounding box of each connected component, in pixels."""

    areas: NDArray[np.int64]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]


def connected_components(mask: NDArray[np.bool_]) -> Components:
    """Components of the true pixels of [H, W], diagonal neighbours included.

    Runs of pixels are joined, not pixels: a page has a hundred times fewer of them.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]  # one past the last pixel
    # Runs of the row above that touch [start - 1, end]: a range in the sorted list of all runs.
    stride = width + 2
    above = (rows - 1) * stride
    first = np.searchsorted(rows * stride + ends, above + starts, side="left")
    last = np.searchsorted(rows * stride + starts, above + ends, side="right")
    counts = np.maximum(last - first, 0)
    lower = np.repeat(np.arange(len(rows)), counts)
    upper = np.repeat(first - np.concatenate(([0], np.cumsum(counts)[:-1])) if len(counts) else first, counts)
    labels = _join(len(rows), lower, upper + np.arange(len(lower)))
    _, labels = np.unique(labels, return_inverse=True)
    total = int(labels.max()) + 1 if len(labels) else 0
    areas = np.bincount(labels, ends - starts, minlength=total).astype(np.int64)
    left, top = np.full(total, width), np.full(total, height)
    right, bottom = np.zeros(total, np.int64), np.zeros(total, np.int64)
    np.minimum.at(left, labels, starts)
    np.minimum.at(top, labels, rows)
    np.maximum.at(right, labels, ends)
    np.maximum.at(bottom, labels, rows + 1)
    return Components(areas, right - left, bottom - top)


def _join(count: int, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest member of each of `count` items' groups, given which pairs belong together."""
    root = np.arange(count)
    while True:
        a, b = root[one], root[other]
        if (a == b).all():
            return root
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root != root[root]).any():
            root = root[root]
