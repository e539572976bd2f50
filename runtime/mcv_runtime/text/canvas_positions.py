"""Number tokens on a canvas of time, row and column: text in a line, each picture an area with its slices in their places.

The reference finds pictures by their tokens alone, so a few line breaks and markers next to a picture belong to it; that is
reproduced here. Source: the published `minicpmv4_7` of transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """Ids of the tokens around and between slices."""

    image_start: int
    image_end: int
    slice_start: int
    slice_end: int
    newline: int

    @property
    def all(self) -> frozenset[int]:
        return frozenset((self.image_start, self.image_end, self.slice_start, self.slice_end, self.newline))


@dataclass(frozen=True, slots=True)
class Crop:
    """The visual tokens of one slice: where they begin in the prompt, and their rows and columns."""

    start: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture: its overview, its slices, and the index behind its last token or marker."""

    overview: Crop
    slices: tuple[Crop, ...]
    end: int

    @property
    def begin(self) -> int:
        """Index of the marker before the overview."""
        return self.overview.start - 1

    @property
    def last_crop_end(self) -> int:
        return (self.slices or (self.overview,))[-1].end


def canvas_positions(ids: NDArray[np.int64], crops: Sequence[Crop], markers: Markers) -> NDArray[np.int64]:
    """Time, row and column of each token: [3, tokens]. `crops` are the prompt's slices in order."""
    positions = np.zeros((3, len(ids)), np.int64)
    position = cursor = 0
    previous: Frame | None = None
    for frame in _frames(ids, crops, markers.all):
        # Frames with only markers between them follow one another directly; the first one's end has swallowed those.
        if previous is None or not markers.all.issuperset(ids[previous.last_crop_end : frame.begin].tolist()):
            positions[:, cursor : frame.begin] = position + np.arange(frame.begin - cursor)
            position += frame.begin - cursor
        position += _place(positions, ids, frame, position, markers) + 1
        cursor, previous = frame.end, frame
    positions[:, cursor:] = position + np.arange(len(ids) - cursor)
    return positions


def _frames(ids: NDArray[np.int64], crops: Sequence[Crop], markers: frozenset[int]) -> list[Frame]:
    """Crops put together to pictures; a picture's markers, and those that directly follow it, are its own."""
    grouped: list[list[Crop]] = []
    for crop in crops:
        if grouped and crop.start and ids[crop.start - 1] != ids[grouped[-1][0].start - 1]:
            grouped[-1].append(crop)
        else:
            grouped.append([crop])
    frames = []
    for overview, *slices in grouped:
        end = (slices or [overview])[-1].end
        while end < len(ids) and int(ids[end]) in markers:
            end += 1
        frames.append(Frame(overview, tuple(slices), end))
    return frames


def _place(positions: NDArray[np.int64], ids: NDArray[np.int64], frame: Frame, origin: int, markers: Markers) -> int:
    """Write a frame's positions; returns the longer side of its canvas."""
    overview, slices = frame.overview, frame.slices
    rows, columns = _slice_grid(slices)
    height, width = (rows * slices[0].rows, columns * slices[0].columns) if slices else (overview.rows, overview.columns)
    positions[:, frame.begin : frame.end] = origin

    def put(index: int, row: int, column: int) -> None:
        positions[1:, index] = origin + row, origin + column

    def put_crop(crop: Crop, row_offsets: NDArray[np.int64], column_offsets: NDArray[np.int64]) -> None:
        positions[1, crop.start : crop.end] = origin + np.repeat(row_offsets, crop.columns)
        positions[2, crop.start : crop.end] = origin + np.tile(column_offsets, crop.rows)

    before = max(origin - 1, 0) - origin
    put(frame.begin, before, before)
    put_crop(overview, spread(height, overview.rows), spread(width, overview.columns))
    if overview.end < len(ids) and ids[overview.end] == markers.image_end:
        put(overview.end, height, width)
    for index, crop in enumerate(slices):
        row, column = divmod(index, columns)
        top, left = row * slices[0].rows, column * slices[0].columns
        put_crop(crop, top + np.arange(crop.rows), left + np.arange(crop.columns))
        put(crop.start - 1, top, left)
        if crop.end < len(ids):
            put(crop.end, top + crop.rows - 1, left + crop.columns - 1)
        if column + 1 == columns and index + 1 < len(slices):
            for between in range(crop.end + 1, slices[index + 1].start - 1):
                if ids[between] == markers.newline:
                    put(between, (row + 1) * slices[0].rows - 1, width)
    return max(height, width)


def _slice_grid(slices: Sequence[Crop]) -> tuple[int, int]:
    """Rows and columns: a row ends where more than the two markers stand between slices."""
    pairs = enumerate(itertools.pairwise(slices))
    columns = next((i + 1 for i, (one, other) in pairs if other.start - one.end > 2), len(slices))
    return (len(slices) // columns, columns) if columns and len(slices) % columns == 0 else (1, len(slices))


def spread(length: int, count: int) -> NDArray[np.int64]:
    """`count` whole numbers spread evenly over 0..length - 1; in float32 and from both ends, as torch's linspace does it."""
    if count == 1:
        return np.zeros(1, np.int64)
    last = np.float32(length - 1)
    step = last / np.float32(count - 1)
    index = np.arange(count, dtype=np.float32)
    values = np.where(index < count // 2, index * step, last - step * (np.float32(count - 1) - index))
    return np.rint(values).astype(np.int64)
