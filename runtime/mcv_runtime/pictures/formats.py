"""The formats that pictures are read in: those that are decoded inside this process, by code made for strangers' files.

Pillow knows others, and opens whatever a file says it is: EPS runs Ghostscript; IPTC, ICNS and PSD hold pictures of any other
kind. Its own limit of pixels is one for the whole process, so formats are opened here one by one, each within the caller's.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PcxImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    SgiImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from mcv_runtime.errors import ImageError
from mcv_runtime.pictures.metadata import PNG_SIGNATURE, Bare, bare_avif, bare_jpeg, bare_png, orientation
from mcv_runtime.pictures.tiff import bare_tiff

_READERS: Final[dict[str, type[ImageFile]]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "DIB": BmpImagePlugin.DibImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "PCX": PcxImagePlugin.PcxImageFile,
    "SGI": SgiImagePlugin.SgiImageFile,
    "TGA": TgaImagePlugin.TgaImageFile,  # has no mark of its own: tried last
}
FORMATS = (*_READERS, "ICO")
_NAMED = {b"%!PS": "EPS", b"8BPS": "PSD", b"<svg": "SVG", b"icns": "ICNS", b"\x1c\x03<\0": "IPTC"}
"""What is refused under its own name, by how it begins."""
_HEIF_BRANDS = (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc")


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A picture whose header was read, and whose pixels were not."""

    image: ImageFile
    bare: Bare
    """Its file, without metadata."""
    kind: str
    name: str

    def again(self) -> ImageFile:
        """The same picture, unread once more."""
        return _opened(self.kind, self.bare.data, self.name)


def read_header(data: bytes, name: str, max_pixels: int, page: int | None = None) -> EncodedPicture:
    """Find out what a picture's file is; raises `ImageError` if it is none, of no known format, or larger than allowed.

    `page`: which one of a TIFF, counted from 0, where its others are read too; None: the first, which is what it stands for.
    """
    if data[:4] == b"\0\0\1\0" and (icon := _largest_icon(data)):
        return read_header(icon, name, max_pixels)
    if data[8:10] == b"\xff\x4f" or data[:2] == b"\xff\x4f" or data[4:8] == b"jP  ":
        _check_codestream(data, name, max_pixels)
    begins = data[:32].ljust(32, b"\0")
    for kind in _READERS:
        if not _accepts(kind, begins):
            continue
        bare = _bare(kind, data, name, max_pixels, page)
        if kind == "WEBP" and (size := _webp_size(data)):
            check_size(size, name, max_pixels)  # its decoder takes the memory when it is opened
        try:
            image = _opened(kind, bare.data, name)
        except (SyntaxError, IndexError, TypeError, KeyError, struct.error):
            continue  # this is how Pillow's readers say that it is something else
        check_size(image.size, name, max_pixels)
        if kind in ("WEBP", "AVIF", "GIF"):
            turned = orientation(image.info.get("exif") or b"", image.info.get("xmp") or b"")
            bare = Bare(bare.data, turned, "frames" if _is_animated(image) else "")
        return EncodedPicture(image, bare, kind, name)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return _heic(data, name, max_pixels)
    if data[:64].lstrip()[:4] == b"%PDF":
        raise ImageError(f"{name} is a PDF, not a picture; ask about it as a Document")
    if refused := _NAMED.get(data[:64].lstrip()[:4]):
        raise ImageError(f"{name} is of the format {refused}, which is not supported; save it as PNG or JPEG")
    raise ImageError(f"{name} is not a picture, or of a kind that is not supported, or its header is damaged")


def _heic(data: bytes, name: str, max_pixels: int) -> EncodedPicture:
    """A phone's photo, upright: libheif turns it as its file says."""
    reader = heic_reader()
    if reader is None:
        raise ImageError(f"{name} is of the format HEIC, which needs pillow-heif; `pip install minicpmv-onnx[heic]`")
    try:
        image = reader(io.BytesIO(data), name)
    except (SyntaxError, ValueError, EOFError, RuntimeError):
        raise ImageError(f"{name} cannot be decoded: the HEIC file is cut off or damaged") from None
    check_size(image.size, name, max_pixels)
    return EncodedPicture(image, Bare(data, more="pictures" if image.n_frames > 1 else ""), "HEIC", name)


@cache
def heic_reader() -> Any:
    """Pillow's plugin for HEIC, an extra, without registering it for the whole process; None where it is not installed."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    return HeifImageFile


def begins_as_picture(begins: bytes) -> bool:
    """Whether the first bytes of a file, at best 32, are those of a format that has a mark of its own."""
    begins = begins.ljust(32, b"\0")
    if begins[:4] == b"\0\0\1\0" or any(_accepts(kind, begins) for kind in _READERS if Image.OPEN[kind][1]):
        return True
    return begins[4:8] == b"ftyp" and begins[8:12] in _HEIF_BRANDS and heic_reader() is not None


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raise `ImageError` for a picture without pixels, and for one of too many."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is too large: {width} x {height} is more than {max_pixels:,} pixels; shrink it or raise max_pixels"
        )


def _accepts(kind: str, prefix: bytes) -> bool:
    accept = Image.OPEN[kind][1]
    return accept is None or accept(prefix) is True


def _opened(kind: str, data: bytes, name: str) -> ImageFile:
    return _READERS[kind](_HalfRead(data) if kind == "WEBP" else io.BytesIO(data), name)


def load(image: Image.Image) -> None:
    """Decode a picture whose size was checked."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # takes its own memory only within Pillow's limit
        image.im = Image.new(image.mode, image.size).im
    image.load()


class _HalfRead(io.BytesIO):
    """Gives the first bytes of a WebP file without its size, so that Pillow does not hold it against its own limit."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(-1 if size is None or size < 0 else min(size, 16))


def with_all_frames(picture: EncodedPicture, data: bytes) -> EncodedPicture:
    """A picture whose further frames can be read too: of a PNG, these were taken for metadata."""
    is_cut = picture.kind == "PNG" and picture.bare.more
    return replace(picture, image=_opened("PNG", data, picture.name)) if is_cut else picture


def _bare(kind: str, data: bytes, name: str, max_pixels: int, page: int | None) -> Bare:
    if kind == "PNG":
        return bare_png(data, name)
    if kind == "JPEG":
        return bare_jpeg(data)
    if kind == "AVIF":
        return Bare(bare_avif(data))
    return bare_tiff(data, name, max_pixels, page) if kind == "TIFF" else Bare(data)


def _is_animated(image: ImageFile) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # only the frames behind the first are damaged
        return True


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _check_codestream(data: bytes, name: str, max_pixels: int) -> None:
    """A JPEG 2000 file says its size twice; what counts for memory is what the compressed data say."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start >= 0 and start + 24 <= len(data):
        right, lower, left, upper = struct.unpack_from(">4I", data, start + 8)
        check_size((right - left, lower - upper), name, max_pixels)


def _largest_icon(data: bytes) -> bytes | None:
    """The picture of an icon file that Pillow takes too, on its own: a PNG, or a bitmap without the mask below it."""
    count = int.from_bytes(data[4:6], "little")
    entries = [struct.unpack_from("<4B2H2I", data, 6 + 16 * i) for i in range(count) if 22 + 16 * i <= len(data)]
    if not entries:
        return None
    *_, size, offset = max(entries, key=lambda entry: ((entry[0] or 256) * (entry[1] or 256), -(entry[5] or 256)))
    inner = data[offset : offset + size]
    if inner.startswith(PNG_SIGNATURE):
        return inner
    if len(inner) < 40 or not _accepts("DIB", inner[:4]):
        return None
    (height,) = struct.unpack_from("<i", inner, 8)
    return inner[:8] + struct.pack("<i", height // 2) + inner[12:]
