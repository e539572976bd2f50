"""Turn a video into pictures, or into packs of frames that are compressed together.

Sources: the published video processor of MiniCPM-V 4.6 in transformers (`frames`), and `encode_video` of the model cards of
MiniCPM-V 2.6 (`strided`) and 4.5 (`packed`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from PIL import Image

from mcv_runtime.bundle.manifest import VideoSpec
from mcv_runtime.errors import ImageError, OptionError
from mcv_runtime.pictures import video_file
from mcv_runtime.pictures.images import MAX_PIXELS, ImageSource, open_picture
from mcv_runtime.pictures.video_file import Units

Number = TypeVar("Number", int, float)
Times: TypeAlias = list[tuple[int, ...]]

_LINE = 6
"""Pixels of black between frames on one picture."""
TIME_STEP = 0.1
"""Seconds."""
MAX_PACK = 6
"""Frames that a temporal resampler was trained to take at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A video to ask about: a file (which needs PyAV), or a list of frames, `fps` of them a second."""

    source: str | os.PathLike[str] | Sequence[ImageSource]
    fps: float = 1.0
    """Of a list of frames; a file has its own."""

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise OptionError(f"fps must be above 0, not {self.fps}")
        if not isinstance(self.source, str | os.PathLike) and not len(self.source):
            raise ImageError("the video has no frames")

    @property
    def name(self) -> str:
        is_file = isinstance(self.source, str | os.PathLike)
        return str(self.source) if is_file else f"a video of {len(self.source)} frames"  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Moment:
    """Frames that belong together, and when each was: in steps of a tenth of a second, empty where a model does not ask."""

    frames: tuple[Image.Image, ...]
    times: tuple[int, ...] = ()


def moments(
    video: Video, spec: VideoSpec, *, max_num_frames: int | None, stack_frames: int | None, max_pixels: int = MAX_PIXELS
) -> Iterator[Moment]:
    """What stands for a video, in order; frames are dropped as soon as they were used."""
    most = spec.max_num_frames if max_num_frames is None else max_num_frames
    stacked = spec.stack_frames if stack_frames is None else stack_frames
    if most < 1 or (stacked is not None and stacked < 1):
        raise OptionError(f"max_num_frames={most} and stack_frames={stacked} must be at least 1")

    def plan(total: int, fps: float) -> tuple[Units, Times]:
        if spec.strategy != "packed":
            return plan_frames(total, fps, total / fps, most, stacked or 1, strided=spec.strategy == "strided"), []
        sample = isinstance(video.source, str | os.PathLike)
        return plan_packs(total, fps, spec, most, stacked, sample=sample)

    groups: Iterator[list[Image.Image]]
    if isinstance(video.source, str | os.PathLike):
        path = Path(video.source)
        units, times = plan(*video_file.probe(path))
        groups = video_file.decode(path, units)
    else:
        frames = video.source
        units, times = plan(len(frames), video.fps)
        groups = ([open_picture(frames[index], max_pixels) for index in unit] for unit in units)
    for number, group in enumerate(groups):
        yield Moment((tile(group),)) if spec.strategy != "packed" else Moment(tuple(group), times[number])


def plan_packs(total: int, fps: float, spec: VideoSpec, most: int, packing: int | None, *, sample: bool) -> tuple[Units, Times]:
    """Which frames are compressed together, and when each was in tenths of a second; at most `most` packs.

    `sample`: take `spec.sample_fps` frames a second, else all; `packing` frames a pack, by default as few as will do.
    """
    duration, wished = total / fps, spec.sample_fps
    if not sample:
        count, needed = total, math.ceil(total / most)
    elif wished * int(duration) <= most:
        count, needed = round(min(wished, round(fps)) * min(most, duration)), 1
    else:
        count, needed = round(duration * wished), math.ceil(duration * wished / most)
    if needed > spec.max_packing:
        count, needed = most * spec.max_packing, spec.max_packing
    size = needed if packing is None else min(packing, MAX_PACK)
    count = max(min(count, total), 1)
    gap = total / count
    chosen = [int(i * gap + gap / 2) for i in range(count)] if count < total else list(range(total))
    steps = np.arange(0, duration, TIME_STEP)
    nearest = np.abs(np.array(chosen)[:, None] / fps - steps).argmin(1)
    times = (steps[nearest] / TIME_STEP).astype(np.int32).tolist()  # truncated, as published
    cuts = range(0, count, size)
    return [tuple(chosen[cut : cut + size]) for cut in cuts], [tuple(times[cut : cut + size]) for cut in cuts]


def plan_frames(
    total: int, fps: float, duration: float, max_num_frames: int, stack_frames: int, *, strided: bool = False
) -> Units:
    """Which frames make which picture: every second its first frame and, stacked, those between; evenly fewer if too long."""
    seconds = math.ceil(duration)
    if strided:
        every = range(0, total, max(round(fps), 1))
        gap = len(every) / max_num_frames
        main = [every[int(i * gap + gap / 2)] for i in range(max_num_frames)] if gap > 1 else list(every)
    elif duration > max_num_frames:
        tenths = [min(int(round(i * 0.1, 1) * fps), total - 1) for i in range(int(duration / 0.1))]
        main = _thin(tenths, max_num_frames)
    else:
        main = [min(int(second * fps), total - 1) for second in range(seconds)]
    between = [second + part / stack_frames for second in range(seconds) for part in range(1, stack_frames)]
    moments = _thin([moment for moment in between if moment < duration], max_num_frames * (stack_frames - 1))
    stacked: dict[int, list[int]] = {}
    for moment in moments:
        stacked.setdefault(int(moment), []).append(min(int(moment * fps), total - 1))
    units: Units = []
    for position, frame in enumerate(main):
        units.append((frame,))
        # In a long video the n-th frame is not of the n-th second; the reference pairs them all the same.
        if position in stacked:
            units.append(tuple(stacked[position]))
    return units


def tile(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames of one size on one picture, as near to a square as two or three allow, black lines between them."""
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    if any(frame.size != (width, height) for frame in frames):
        raise ImageError("the frames of a video differ in size, so they cannot be stacked")
    rows, columns = _tiling(len(frames), width, height)
    canvas = Image.new("RGB", _canvas_size(rows, columns, width, height))
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        canvas.paste(frame, (column * (width + _LINE), row * (height + _LINE)))
    return canvas


def _tiling(count: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns."""
    if count == 4:
        return 2, 2
    if count > 3:
        return 1, count

    def stretch(shape: tuple[int, int]) -> float:
        across, down = _canvas_size(*shape, width, height)
        return abs(across / down - 1)

    line, column = (1, count), (count, 1)
    if count == 2 and stretch(line) == stretch(column):
        return line if width >= height else column
    return min(line, column, key=stretch)


def _canvas_size(rows: int, columns: int, width: int, height: int) -> tuple[int, int]:
    return columns * (width + _LINE) - _LINE, rows * (height + _LINE) - _LINE


def _thin(items: list[Number], most: int) -> list[Number]:
    return items if len(items) <= most else [items[i] for i in np.linspace(0, len(items) - 1, most, dtype=int)]
