"""What a picture's file says beside its pixels: the way it is turned is read, the rest is kept from the decoder.

Pillow refuses good pictures for a text that is too long, a colour profile or a tag that it cannot write again, and warns about
others. None of that changes a pixel, so it never sees them.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from mcv_runtime.errors import ImageError, shown

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_JPEG_APPS = frozenset({0xE0, 0xEE})
"""JFIF and Adobe say how the colours are coded; the other application segments are metadata."""
_EXIF_PREFIX = b"Exif\0\0"
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)([1-8])""")
_AVIF_EXIF = re.compile(rb"(\0\0\0\0|\0\0\0\x06Exif\0\0)(?:II\*\0|MM\0\*).{10}", re.DOTALL)
_ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture of each EXIF orientation is turned upright; 1 is."""


@dataclass(frozen=True, slots=True)
class Bare:
    """A picture's file without metadata."""

    data: bytes
    orientation: int = 1
    """As EXIF counts, 1 to 8."""
    more: str = ""
    """What else the file holds that is not read: "pages" or "frames"."""
    see_through: bool = False
    """Some of its colours are transparent, which was left out."""


def bare_png(data: bytes, name: str) -> Bare:
    """A PNG's chunks of pixels. These must be whole; a damaged chunk of anything else does no harm."""
    kept, exif, more, see_through = [PNG_SIGNATURE], b"", "", False
    for kind, chunk in _png_chunks(data):
        complete = len(chunk) == 12 + int.from_bytes(chunk[:4])
        whole = complete and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in _PNG_PIXELS:
            if complete and not whole:
                raise ImageError(f"{name} cannot be decoded: its chunk {kind.decode()} is damaged")
            kept.append(chunk)  # of a file that was cut off, as much as there is: the decoder says if pixels are missing
        elif kind[:1].isupper():
            raise ImageError(f"{name} is no standard PNG: it needs a chunk {shown(kind)}; save it again with another program")
        elif kind == b"eXIf" and whole:
            exif = chunk[8:-4]
        elif kind == b"acTL":
            more = "frames"
        elif kind == b"tRNS":
            see_through = True
    return Bare(b"".join(kept), orientation(exif), more, see_through)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each chunk: length, kind, content and checksum, or what is left of the last."""
    position = len(PNG_SIGNATURE)
    kind = b""
    while position + 8 <= len(data) and kind != b"IEND":
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        yield kind, data[position : position + 12 + length]
        position += 12 + length


def bare_jpeg(data: bytes) -> Bare:
    """A JPEG without comments and application segments; what comes behind the first scan's header is left as it is."""
    kept, turned, position = [data[:2]], 0, 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xFF:  # filling
            position += 1
            continue
        if marker in (0xD8, 0xD9, 0xDA) or marker < 0xC0 or 0xD0 <= marker <= 0xD7 or length < 2:
            break  # the scan, or something odd, which is the decoder's to judge
        segment = data[position : position + 2 + length]
        position += 2 + length
        if marker == 0xE1 and segment[4:].startswith(_EXIF_PREFIX):
            turned = turned or _exif_orientation(segment[4:])
        elif marker == 0xE1 and segment[4:].startswith(_XMP_PREFIX):
            turned = turned or _xmp_orientation(segment)
        if marker in _JPEG_APPS or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
    kept.append(data[position:])
    return Bare(b"".join(kept), turned or 1)


def bare_avif(data: bytes) -> bytes:
    """An AVIF file whose EXIF block is empty. Boxes of its own say how it is turned; the block does not count."""
    return _AVIF_EXIF.sub(lambda found: found[1] + b"II*\0\x08\0\0\0" + bytes(len(found[0]) - len(found[1]) - 8), data)


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The EXIF orientation, 1 to 8; 1 where it is not said, or said so that nobody can read it."""
    return _exif_orientation(exif) or _xmp_orientation(xmp) or 1


def _exif_orientation(exif: bytes) -> int:
    """0: there is none."""
    block = exif.removeprefix(_EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(block[:2], "")
    try:
        (first,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, first)
        for place in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", block, place)
            if order and tag == _ORIENTATION_TAG and kind in (3, 4) and values == 1:
                (value,) = struct.unpack_from(order + " HI"[kind - 2], block, place + 8)
                return int(value) if value in range(1, 9) else 0
    except struct.error:  # it ends early
        pass
    return 0


def _xmp_orientation(xmp: bytes) -> int:
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 0
