"""Read a video file frame by frame through PyAV, an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from mcv_runtime.errors import ImageError, OptionError

Units: TypeAlias = list[tuple[int, ...]]
"""The numbers of the frames that belong together."""


def probe(path: Path) -> tuple[int, float]:
    """How many frames a video has, and how many a second."""
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(1)
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if not total:
        raise ImageError(f"{path} has no frames")
    return total, float(rate)


def decode(path: Path, units: Units) -> Iterator[list[Image.Image]]:
    """The frames of each unit, in order."""
    with _opened(path) as (container, stream):
        yield from _assemble(container.decode(stream), units)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError:
        raise OptionError("reading a video file needs PyAV; install it with `pip install minicpmv-onnx[video]`") from None
    try:
        with av.open(str(path)) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise ImageError(f"{path} has no pictures, only sound")
            yield container, stream
    except (OSError, ValueError) as error:  # PyAV's errors are also the builtin ones
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} cannot be read as a video: {getattr(error, 'strerror', None) or error}") from error


def _assemble(decoded: Iterator[Any], units: Units) -> Iterator[list[Image.Image]]:
    """Units from frames that come one by one, holding only those that are still needed."""
    last_use = {frame: position for position, unit in enumerate(units) for frame in unit}
    held: dict[int, Image.Image] = {}
    newest: Image.Image | None = None
    count = 0
    for position, unit in enumerate(units):
        while count <= max(unit):
            frame = next(decoded, None)
            if frame is None:  # the file is shorter than its header says
                break
            if count in last_use:
                newest = held[count] = frame.to_image()
            count += 1
        if newest is None:
            raise ImageError("the video has no frames that can be decoded")
        yield [held.get(index, newest) for index in unit]
        held = {index: image for index, image in held.items() if last_use[index] > position}
