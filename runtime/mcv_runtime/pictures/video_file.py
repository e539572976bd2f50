"""Read a video file frame by frame through PyAV, an extra.

FFmpeg would open whatever a name or a file's content says: addresses, other files, playlists, devices. It is given a plain file
that is open already, and neither a protocol nor a container that could lead it anywhere else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from mcv_runtime.errors import ImageError, McvError, OptionError, ResourceError, printable
from mcv_runtime.pictures.formats import check_size
from mcv_runtime.pictures.images import MAX_PIXELS, describe, open_local

Units: TypeAlias = list[tuple[int, ...]]
"""The numbers of the frames that belong together."""

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,apng"
CODECS = frozenset(
    {"h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "msmpeg4v2", "msmpeg4", "mpeg1video"}
    | {"mpeg2video", "h263", "flv", "wmv1", "wmv2", "wmv3", "vc1", "theora", "mjpeg", "mjpegb", "gif", "apng", "png", "prores"}
    | {"dnxhd", "ffv1", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "dvvideo"}
)
"""Decoders that may see a stranger's file: those of cameras, phones, browsers and editors, not of old games."""
MAX_SECONDS = 7 * 24 * 3600.0
"""The longest video."""
_MISSING = 0.1
"""The share of its frames that a file may lack of what its header counts; more was cut off."""
_MARGIN_PIXELS = 1 << 20
"""Decoders count the padding around a frame too: they get a wider limit than the frames that come out."""
_UNREADABLE = frozenset({"Invalid data found when processing input", "Invalid argument", "End of file", "Input/output error"})
"""What FFmpeg says of a file that it cannot read on."""
_UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
"""How a frame is turned, by its display matrix: what a step right and a step down in the file are right and down as shown."""


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What is known of a video file before any frame is decoded."""

    frames: int
    fps: float
    size: tuple[int, int]
    """(width, height) of a frame in square pixels, not turned yet."""


def inspect(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, check: Callable[[], None] | None = None) -> VideoFacts:
    """Look at a video file; raises `ImageError`. `check` is called between packets, and may raise."""
    name = describe(path)
    with _opened(path, max_pixels) as (container, stream):
        frames, fps = _timing(stream, _steps(container.demux(stream), path, check))
        size = _square(stream.codec_context.width, stream.codec_context.height, stream.sample_aspect_ratio)
    if not frames:
        raise ImageError(f"{name} has no frames")
    if frames > (length := Path(path).stat().st_size):
        raise ImageError(f"{name} cannot be read as a video: {frames:,} frames cannot be in {length:,} bytes")
    if not fps > 0 or frames / fps > MAX_SECONDS:
        raise ImageError(f"{name} lasts longer than {MAX_SECONDS / 3600:.0f} hours; cut it into pieces")
    check_size(size, name, max_pixels)
    return VideoFacts(frames, fps, size)


def probe(path: str | os.PathLike[str]) -> tuple[int, float]:
    """How many frames a video has, and how many a second."""
    facts = inspect(path)
    return facts.frames, facts.fps


def decode(
    path: str | os.PathLike[str], units: Units, max_pixels: int = MAX_PIXELS, check: Callable[[], None] | None = None
) -> Iterator[list[Image.Image]]:
    """The frames of each unit, in order, upright and with square pixels; `check` is called between frames, and may raise."""
    with _opened(path, max_pixels) as (container, stream):
        frames = _steps(container.decode(stream), path, check)
        yield from _assemble(frames, units, stream.sample_aspect_ratio, path, max_pixels)


@contextmanager
def _opened(path: str | os.PathLike[str], max_pixels: int) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError:
        raise OptionError("reading a video file needs PyAV; install it with `pip install minicpmv-onnx[video]`") from None
    name = describe(path)
    within = {"max_pixels": str(2 * max_pixels + _MARGIN_PIXELS)}
    allowed = {"protocol_whitelist": "", "format_whitelist": CONTAINERS, "codec_whitelist": ",".join(sorted(CODECS))}
    with open_local(path) as file:
        with _one_line(path):
            container = av.open(file, options=allowed | within)
        with container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                sound = "has only sound" if container.streams.audio else "is cut off or damaged: there is nothing in it"
                raise ImageError(f"{name} has no pictures; it {sound}")
            codec = stream.codec_context
            if codec is None or codec.name not in CODECS:
                raise ImageError(f"{name} is coded in a way that is not supported; convert it to H.264 (an .mp4 file)")
            if not codec.width or not codec.height:
                raise ImageError(f"{name} has frames without a size, or of far more than {max_pixels:,} pixels")
            check_size((codec.width, codec.height), name, max_pixels)
            codec.options = within
            yield container, stream


@contextmanager
def _one_line(path: str | os.PathLike[str]) -> Iterator[None]:
    """FFmpeg's errors come in dozens of classes."""
    try:
        yield
    except McvError:
        raise
    except MemoryError as error:
        raise ResourceError(f"there is not enough memory for {describe(path)}; shrink it or lower max_pixels") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if reason in _UNREADABLE:
            reason = "it is cut off, damaged or of a kind that is not supported"
        raise ImageError(f"{describe(path)} cannot be read as a video: {printable(' '.join(reason.split()))[:200]}") from error


def _timing(stream: Any, packets: Iterator[Any]) -> tuple[int, float]:
    """Frames and frames a second: by the header, or by going through the file where that does not count frames.

    The header's rate holds unless the frames' own times contradict it. Then it is their average, as torchcodec has it, by which
    the published processors read videos.
    """
    rate = float(stream.average_rate or stream.guessed_rate or 1)
    if stream.frames > 0:
        return _agreed(stream.frames, rate, float((stream.duration or 0) * (stream.time_base or 0)))
    frames, last, earliest, latest = 0, 0, math.inf, -math.inf
    for packet in packets:
        if packet.size:
            frames += 1
            if packet.pts is not None:
                earliest, latest = min(packet.pts, earliest), max(packet.pts, latest)
                last = packet.duration or last
    between = max(latest - earliest, 0)
    return _agreed(frames, rate, (between + (last or between / max(frames - 1, 1))) * float(stream.time_base or 0))


def _agreed(frames: int, rate: float, span: float) -> tuple[int, float]:
    """`span`: seconds from the first frame to the end of the last one; 0 where that is not known."""
    contradicted = span > 0 and abs(frames / rate - span) > max(2 / rate, 0.02 * span)
    return frames, frames / span if contradicted else rate


def _steps(made: Iterator[Any], path: str | os.PathLike[str], check: Callable[[], None] | None) -> Iterator[Any]:
    """Packets or frames, one by one; only what FFmpeg raises becomes our error, not what `check` does."""
    while True:
        with _one_line(path):
            step = next(made, None)
        if step is None:
            return
        if check is not None:
            check()
        yield step


def _assemble(
    decoded: Iterator[Any], units: Units, pixel_aspect: Any, path: str | os.PathLike[str], max_pixels: int
) -> Iterator[list[Image.Image]]:
    """Units from frames that come one by one, holding only those that are still needed."""
    last_use = {frame: position for position, unit in enumerate(units) for frame in unit}
    needed = max(last_use, default=0) + 1
    held: dict[int, Image.Image] = {}
    newest: Image.Image | None = None
    count = 0
    for position, unit in enumerate(units):
        while count <= max(unit):
            frame = next(decoded, None)
            if frame is None:
                if count < (1 - _MISSING) * needed - 1:
                    raise ImageError(f"{describe(path)} is cut off: it ends after {count} of at least {needed} frames")
                break  # headers count a little too much
            if count in last_use:
                with _one_line(path):
                    newest = held[count] = _shown(frame, pixel_aspect, describe(path), max_pixels)
            count += 1
        if newest is None:
            raise ImageError(f"{describe(path)} has no frames that can be decoded")
        yield [held.get(index, newest) for index in unit]
        held = {index: image for index, image in held.items() if last_use[index] > position}


def _shown(frame: Any, pixel_aspect: Any, name: str, max_pixels: int) -> Image.Image:
    """A frame as a player shows it: its pixels made square, by enlarging one side, and turned as the display matrix says."""
    check_size((frame.width, frame.height), name, max_pixels)
    size = _square(frame.width, frame.height, pixel_aspect)
    check_size(size, name, max_pixels)
    image: Image.Image = frame.to_image()
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    turn = _UPRIGHT.get(_display_matrix(frame))
    return image if turn is None else image.transpose(turn)


def _square(width: int, height: int, pixel_aspect: Any) -> tuple[int, int]:
    aspect = float(pixel_aspect or 1)
    return round(width * max(aspect, 1)), round(height * max(1 / aspect, 1))


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """The four numbers that turn and mirror, to the nearest quarter turn."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            numbers = [number / 0x10000 for number in np.frombuffer(bytes(data), np.int32).tolist()]
            a, b, c, d = (round(max(-1.0, min(1.0, numbers[i]))) for i in (0, 1, 3, 4))
            return a, b, c, d
    return 1, 0, 0, 1
