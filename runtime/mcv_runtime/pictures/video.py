"""Turn a video into pictures, or into packs of frames that are compressed together.

Sources: the published video processor of MiniCPM-V 4.6 in transformers (`frames`), and `encode_video` of the model cards of
MiniCPM-V 2.6 (`strided`) and 4.5 (`packed`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image

from mcv_runtime.bundle.manifest import VideoSpec
from mcv_runtime.errors import ImageError, OptionError
from mcv_runtime.pictures import video_file
from mcv_runtime.pictures.formats import check_size
from mcv_runtime.pictures.images import MAX_PIXELS, ImageSource, describe, open_picture, picture_size
from mcv_runtime.pictures.slicing import Size
from mcv_runtime.pictures.video_file import MAX_SECONDS, Units

Times: TypeAlias = list[tuple[int, ...]]

_LINE = 6
"""Pixels of black between frames on one picture."""
TIME_STEP = 0.1
"""Seconds."""
MAX_PACK = 6
"""Frames that a temporal resampler was trained to take at once."""
MAX_NUM_FRAMES, MAX_STACK_FRAMES = 16_384, 64
"""The most that a request may ask for: more than a context holds, and than can be seen on one picture."""


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A video to ask about: a file (which needs PyAV), or a list of frames, `fps` of them a second."""

    source: str | os.PathLike[str] | Sequence[ImageSource]
    fps: float = 1.0
    """Of a list of frames; a file has its own."""

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise OptionError(f"fps must be above 0, not {self.fps}")
        if isinstance(self.source, str | os.PathLike):
            return
        if not len(self.source):
            raise ImageError("the video has no frames")
        if len(self.source) / self.fps > MAX_SECONDS:
            raise OptionError(f"fps={self.fps} makes a video of more than {MAX_SECONDS / 3600:.0f} hours; give a higher one")

    @property
    def name(self) -> str:
        is_file = isinstance(self.source, str | os.PathLike)
        return describe(self.source) if is_file else f"a video of {len(self.source)} frames"  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Moment:
    """Frames that belong together, and when each was: in steps of a tenth of a second, empty where a model does not ask."""

    frames: tuple[Image.Image, ...]
    times: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """Which frames of a video are taken, known before any is decoded."""

    video: Video
    spec: VideoSpec
    units: Units
    """The frames of each picture, or of each pack."""
    times: Times
    """Of each pack's frames; empty where a model does not ask."""
    size: Size | None
    """(width, height) of one frame, perhaps turned still; None where only reading it would tell."""

    def sizes(self) -> list[tuple[Size, Size]] | None:
        """(width, height) of each picture, its frames as they are and turned by a quarter; None if only reading one tells."""
        if self.size is None:
            return None
        whole = self.spec.strategy != "packed"
        width, height = self.size
        alike = {
            count: (_tiled_size(count, width, height), _tiled_size(count, height, width))
            for count in ({len(unit) for unit in self.units} if whole else {1})
        }
        return [alike[len(unit) if whole else 1] for unit in self.units]

    def moments(self, *, max_pixels: int = MAX_PIXELS, check: Callable[[], None] | None = None) -> Iterator[Moment]:
        """The frames, in order, dropped as soon as they were used; `check` is called between frames, and may raise."""
        source = self.video.source
        groups: Iterator[list[Image.Image]]
        if isinstance(source, str | os.PathLike):
            groups = video_file.decode(source, self.units, max_pixels, check)
        else:
            groups = ([open_picture(source[index], max_pixels) for index in unit] for unit in self.units)
        for number, group in enumerate(groups):
            if check is not None:
                check()
            whole = self.spec.strategy != "packed"
            yield Moment((tile(group, max_pixels),)) if whole else Moment(tuple(group), self.times[number])


def plan_video(
    video: Video,
    spec: VideoSpec,
    *,
    max_num_frames: int | None = None,
    stack_frames: int | None = None,
    max_pixels: int = MAX_PIXELS,
    check: Callable[[], None] | None = None,
) -> VideoPlan:
    """Choose a video's frames by their number and rate; a file is looked at, but not decoded."""
    most = spec.max_num_frames if max_num_frames is None else max_num_frames
    stacked = spec.stack_frames if stack_frames is None else stack_frames
    if not 1 <= most <= MAX_NUM_FRAMES:
        raise OptionError(f"max_num_frames={most} is not in 1..{MAX_NUM_FRAMES}")
    if stacked is not None and not 1 <= stacked <= MAX_STACK_FRAMES:
        raise OptionError(f"stack_frames={stacked} is not in 1..{MAX_STACK_FRAMES}")
    size: Size | None
    if isinstance(video.source, str | os.PathLike):
        facts = video_file.inspect(video.source, max_pixels, check)
        total, fps, size = facts.frames, facts.fps, facts.size
    else:
        total, fps, size = len(video.source), video.fps, picture_size(video.source[0], max_pixels)
    if spec.strategy != "packed":
        strided = spec.strategy == "strided"
        return VideoPlan(video, spec, plan_frames(total, fps, total / fps, most, stacked or 1, strided=strided), [], size)
    sample = isinstance(video.source, str | os.PathLike)
    return VideoPlan(video, spec, *plan_packs(total, fps, spec, most, stacked, sample=sample), size)


def moments(
    video: Video,
    spec: VideoSpec,
    *,
    max_num_frames: int | None,
    stack_frames: int | None,
    max_pixels: int = MAX_PIXELS,
    check: Callable[[], None] | None = None,
) -> Iterator[Moment]:
    """What stands for a video, in order; frames are dropped as soon as they were used."""
    limits = {"max_num_frames": max_num_frames, "stack_frames": stack_frames}
    yield from plan_video(video, spec, **limits, max_pixels=max_pixels, check=check).moments(max_pixels=max_pixels, check=check)


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
    steps, moments = np.arange(0, duration, TIME_STEP), np.array(chosen) / fps
    upper = np.searchsorted(steps[:-1], moments)
    lower = np.maximum(upper - 1, 0)
    nearest = steps[np.where(moments - steps[lower] <= steps[upper] - moments, lower, upper)]
    times = (nearest / TIME_STEP).astype(np.int32).tolist()  # truncated, as published
    cuts = range(0, count, size)
    return [tuple(chosen[cut : cut + size]) for cut in cuts], [tuple(times[cut : cut + size]) for cut in cuts]


def plan_frames(
    total: int, fps: float, duration: float, max_num_frames: int, stack_frames: int, *, strided: bool = False
) -> Units:
    """Which frames make which picture: every second its first frame and, stacked, those between; evenly fewer if too long."""
    seconds, parts = math.ceil(duration), stack_frames - 1
    if strided:
        every = range(0, total, max(round(fps), 1))
        gap = len(every) / max_num_frames
        main = [every[int(i * gap + gap / 2)] for i in range(max_num_frames)] if gap > 1 else list(every)
    elif duration > max_num_frames:
        tenths = _spread(int(duration / 0.1), max_num_frames)
        main = [min(int(round(tenth * 0.1, 1) * fps), total - 1) for tenth in tenths]
    else:
        main = [min(int(second * fps), total - 1) for second in range(seconds)]
    inside = sum(seconds - 1 + part / stack_frames < duration for part in range(1, stack_frames))  # of the last second
    stacked: dict[int, list[int]] = {}
    for number in _spread((seconds - 1) * parts + inside, max_num_frames * parts):
        second, part = divmod(number, parts)
        stacked.setdefault(second, []).append(min(int((second + (part + 1) / stack_frames) * fps), total - 1))
    units: Units = []
    for position, frame in enumerate(main):
        units.append((frame,))
        # In a long video the n-th frame is not of the n-th second; the reference pairs them all the same.
        if position in stacked:
            units.append(tuple(stacked[position]))
    return units


def tile(frames: Sequence[Image.Image], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Frames of one size on one picture, as near to a square as two or three allow, black lines between them."""
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    if any(frame.size != (width, height) for frame in frames):
        raise ImageError("the frames of a video differ in size, so they cannot be stacked")
    _, columns = _tiling(len(frames), width, height)
    size = _tiled_size(len(frames), width, height)
    check_size(size, f"the picture of {len(frames)} stacked frames", max_pixels)
    canvas = Image.new("RGB", size)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        canvas.paste(frame, (column * (width + _LINE), row * (height + _LINE)))
    return canvas


def _tiled_size(count: int, width: int, height: int) -> Size:
    return _canvas_size(*_tiling(count, width, height), width, height) if count > 1 else (width, height)


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


def _spread(count: int, most: int) -> Sequence[int]:
    """The numbers below `count`, or `most` of them, evenly."""
    return range(count) if count <= most else [int(number) for number in np.linspace(0, count - 1, most, dtype=int)]
