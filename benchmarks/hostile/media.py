"""Pictures and videos with damaged bytes, lying sizes and counts, in every format that is read and some that are not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from random import Random

import av
import numpy as np
from PIL import Image

from hostile.guarded import Case, Draw
from mcv_runtime.bundle.manifest import ImageSpec, VideoSpec
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.pictures.video import Video, moments

MAX_PIXELS = 4_000_000
_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "AVIF",
    "JPEG2000",
    "PPM",
    "PCX",
    "SGI",
    "TGA",
    "ICO",
    "EPS",
    "PDF",
    "IM",
)
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I")
_BEGINNINGS = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"\x1c\x03<\0",
    b"8BPS\0\1",
    b"icns\0\0\0\x20",
    b"<svg xmlns='x'>",
    b"#EXTM3U\n",
    b"BLP2",
    b"DDS ",
]
_VIDEOS = {"mp4": "mpeg4", "mkv": "mpeg4", "avi": "mjpeg", "ts": "mpeg2video", "webm": "libvpx", "gif": "gif", "flv": "flv"}


def pictures(scratch: Path) -> Draw:
    """Bytes of a picture, changed where its header is or anywhere."""
    seeds = _encoded()
    path = scratch / "picture"

    def draw(dice: Random) -> Case:
        what, data = dice.choice(seeds)
        path.write_bytes(_png_that_lies(dice) if dice.random() < 0.03 else damaged(data, dice))
        return Case(what, lambda: slice_picture(path, ImageSpec(), max_pixels=MAX_PIXELS).size)

    return draw


def videos(scratch: Path) -> Draw:
    """Bytes of a video, changed where its header is or anywhere."""
    seeds = [(kind, _recorded(scratch / f"seed.{kind}", codec)) for kind, codec in _VIDEOS.items()]
    path = scratch / "video"

    def draw(dice: Random) -> Case:
        what, data = dice.choice(seeds)
        path.write_bytes(damaged(data, dice))
        spec = VideoSpec(strategy=dice.choice(("frames", "strided", "packed")))
        limits = {"max_num_frames": 16, "stack_frames": dice.choice((None, 3)), "max_pixels": MAX_PIXELS}
        return Case(f"{what}, {spec.strategy}", lambda: sum(len(one.frames) for one in moments(Video(path), spec, **limits)))

    return draw


def _encoded() -> list[tuple[str, bytes]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8))
    found = []
    for form in _FORMATS:
        for mode in _MODES:
            file = io.BytesIO()
            try:
                noise.convert("I" if mode == "I;16" else mode).convert(mode).save(file, form)
            except (OSError, ValueError, KeyError):  # this format has no such mode
                continue
            found.append((f"{form} {mode}", file.getvalue()))
    return found


def _recorded(path: Path, codec: str) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        for shade in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def damaged(data: bytes, dice: Random) -> bytes:
    """A file with a few bytes changed, cut off or behind something else."""
    made = bytearray(data)
    for _ in range(dice.choice((1, 2, 3, 8, 30))):
        place = dice.randrange(min(len(made), dice.choice((32, 128, 512, 10**9))))
        if dice.random() < 0.2:  # a size, a count, an offset
            wide = struct.pack(dice.choice("<>") + "I", dice.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)))
            made[place : place + 4] = wide
        else:
            made[place] = dice.choice((0, 255, 127, 128, dice.randrange(256)))
    if dice.random() < 0.2:
        del made[dice.randrange(len(made)) :]
    if dice.random() < 0.05:
        made[:0] = dice.choice(_BEGINNINGS)
    return bytes(made)


def _png_that_lies(dice: Random) -> bytes:
    """A PNG of any size in its header, and rows of zeros that compress a thousandfold."""
    width, height = dice.choice(((1, 10**6), (10**5, 10**5), (2**31 - 1, 1), (1999, 2000), (0, 5)))
    header = struct.pack(">IIBBBBB", width, height, dice.choice((1, 8, 16)), dice.choice((0, 2, 6)), 0, 0, 0)
    rows = zlib.compress(bytes(dice.choice((10, 10**7))), 9)
    chunks = [(b"IHDR", header), (b"tEXt", b"a\0" + bytes(dice.choice((0, 10**5)))), (b"IDAT", rows), (b"IEND", b"")]
    written = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)
