"""Open any picture as plain RGB, within a pixel limit, or say in one line why not."""

from __future__ import annotations

import logging
import os
import re
import selectors
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image

from mcv_runtime.errors import ImageError, McvError, OptionError, ResourceError, printable, shown
from mcv_runtime.files import open_regular, read_bounded
from mcv_runtime.pictures.formats import EncodedPicture, check_size, load, read_header
from mcv_runtime.pictures.levels import joined, to_rgb
from mcv_runtime.pictures.metadata import UPRIGHT, Bare, orientation

if TYPE_CHECKING:
    from numpy.typing import NDArray

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

MAX_PIXELS = 64_000_000
_BYTES_PER_PIXEL, _METADATA_BYTES = 8, 64 << 20
"""The largest file that is read: every pixel uncompressed, in 16 bits, with transparency; and what else it says."""
_PIPE_PATIENCE_S = 5.0
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")
_DARK = 16
"""Upper bytes of 16-bit colours that are all below: 12 bits or less, and nearly black if taken for 16."""
_OTHER_ORDER = {
    "RGB;16B": "RGB;16L",
    "RGBA;16B": "RGBA;16L",
    "RGB;16L": "RGB;16B",
    "RGBA;16L": "RGBA;16B",
    "LA;16B": None,  # Pillow cannot read it the other way round
}
_log = logging.getLogger(__name__)


def describe(source: ImageSource) -> str:
    """What to call a picture in a message."""
    if not isinstance(source, str | os.PathLike):
        return f"the given {type(source).__name__}"
    text = str(source)
    return text if text.isprintable() and len(text) < 500 else shown(text)


def open_picture(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture from a path, encoded bytes, a Pillow image or an array [H, W], [H, W, 3] or [H, W, 4] of uint8.

    A path may be a pipe's. Transparency is dropped, as the published code does, and of several pages or frames the first is
    read, which is logged. Raises `ImageError`; the limit is checked before anything is decoded.
    """
    name = describe(source)
    with one_line(name, max_pixels):
        if isinstance(source, Image.Image):
            return _decode_given(source, name, max_pixels)
        if isinstance(source, np.ndarray):
            return _decode_given(_from_array(source, name), name, max_pixels)
        return decode_file(read_header(read_encoded(source, name, max_pixels), name, max_pixels), name)


def picture_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """(width, height) of what `open_picture` would give, by the header alone; a Pillow image is not turned yet.

    None for a pipe, which can be read only once.
    """
    name = describe(source)
    with one_line(name, max_pixels):
        if isinstance(source, Image.Image):
            size = source.size
        elif isinstance(source, np.ndarray):
            size = _from_array(source, name).size
        elif _is_pipe(source):
            return None
        else:
            header = read_header(read_encoded(source, name, max_pixels), name, max_pixels)
            size = header.image.size if header.bare.orientation < 5 else header.image.size[::-1]
        check_size(size, name, max_pixels)
        return size


@contextmanager
def one_line(name: str, max_pixels: int) -> Iterator[None]:
    """Have whatever goes wrong with a picture be one of our errors."""
    if max_pixels < 1:
        raise OptionError(f"max_pixels must be at least 1, not {max_pixels}")
    try:
        yield
    except McvError:
        raise
    except MemoryError as error:
        raise ResourceError(f"there is not enough memory for {name}; shrink it or lower max_pixels") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        reason = " ".join(printable(str(error)[:200]).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be decoded: {reason}") from error


def open_local(path: str | os.PathLike[str], max_bytes: int | None = None) -> BinaryIO:
    """Open a picture's or video's file, which is a plain file on this machine; raises `ImageError`."""
    name = describe(path)
    try:
        os.stat(path)  # noqa: PTH116 - of any name
    except ValueError:  # a NUL, or half a character
        raise ImageError(f"{name} cannot be read: it is no name of a file") from None
    except OSError as error:
        if is_address(os.fspath(path)):
            raise ImageError(f"{name} is an address, not a file; download it first") from None
        raise ImageError(f"{name} cannot be read: {error.strerror}") from None
    return open_regular(path, error=ImageError, max_bytes=max_bytes)


def is_address(path: str) -> bool:
    """Whether a path is that of no file on this machine: a URL, or a picture as a data: URI."""
    return bool(_ADDRESS.match(path))


def read_encoded(source: ImageSource, name: str, max_pixels: int) -> bytes:
    """All of an encoded picture."""
    if isinstance(source, bytes):
        if not source:
            raise ImageError(f"{name} are empty")
        return source
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"{name} is not a picture: give a path, bytes, a Pillow image or a numpy array")
    limit = _BYTES_PER_PIXEL * max_pixels + _METADATA_BYTES
    if _is_pipe(source):
        data = _read_pipe(Path(source), name, limit)
    else:
        with open_local(source, limit) as file:
            data = read_bounded(file, name, error=ImageError, max_bytes=limit)
    if not data:
        raise ImageError(f"{name} is an empty file")
    return data


def _is_pipe(source: Any) -> bool:
    try:
        return isinstance(source, str | os.PathLike) and stat.S_ISFIFO(Path(source).stat().st_mode)
    except (OSError, ValueError):  # what is wrong is said when it is opened
        return False


def _read_pipe(path: Path, name: str, limit: int) -> bytes:
    """What comes through a pipe. One that has a name may have nobody who writes: it is not waited for longer than 5 seconds."""
    try:
        if path.is_relative_to("/dev") or path.is_relative_to("/proc"):  # the process's own, from `|` or `<(...)`
            with path.open("rb") as file:
                return read_bounded(file, name, error=ImageError, max_bytes=limit)
        nonblocking = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(nonblocking, "rb", buffering=0) as pipe, selectors.DefaultSelector() as waiting:
            data = bytearray()
            waiting.register(pipe, selectors.EVENT_READ)
            while waiting.select(_PIPE_PATIENCE_S):
                piece = pipe.read(1 << 20)
                if not piece:
                    return bytes(data)
                data += piece
                if len(data) > limit:
                    raise ImageError(f"{name} has more than {limit:,} bytes")
            raise ImageError(f"{name} is a pipe through which nothing comes")
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from None


def _from_array(array: NDArray[Any], name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"{name} has shape {array.shape} of {array.dtype}; give [H, W], [H, W, 3] or [H, W, 4] of uint8")
    if 0 in array.shape:
        raise ImageError(f"{name} has no pixels (shape {array.shape})")
    return Image.fromarray(np.ascontiguousarray(array))


def _decode_given(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    check_size(image.size, name, max_pixels)
    image.load()  # before its metadata: of a PNG, asking for these loads it too, and an error would be taken for theirs
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not spoil the pixels
        turned = orientation(image.info.get("exif") or b"")
    return _finished(to_rgb(image), image, Bare(b"", turned), name)


def decode_file(picture: EncodedPicture, name: str) -> Image.Image:
    """The upright RGB picture."""
    with picture.image as image:
        mode = _raw_mode(image)
        load(image)
        rgb = to_rgb(image)
        if mode in _OTHER_ORDER and max(high for _, high in rgb.getextrema()) < _DARK:  # type: ignore[misc]
            other = _OTHER_ORDER[mode]
            rgb = joined(rgb, _lower_bytes(picture, other) if other else Image.new("RGB", rgb.size))
        if picture.bare.more:
            _log.warning("%s has several %s; only the first is read (a Document has all)", name, picture.bare.more)
        return _finished(rgb, image, picture.bare, name)


def _finished(rgb: Image.Image, image: Image.Image, bare: Bare, name: str) -> Image.Image:
    has_alpha = image.mode in ("RGBA", "LA", "PA") and image.getextrema()[-1] != (255, 255)
    if (has_alpha or bare.see_through or "transparency" in image.info) and _is_plain(rgb):
        _log.warning("%s is all one colour without its transparency, which is dropped; put it on a background first", name)
    return rgb.transpose(UPRIGHT[bare.orientation]) if bare.orientation in UPRIGHT else rgb


def _is_plain(rgb: Image.Image) -> bool:
    return all(low == high for low, high in rgb.getextrema())  # type: ignore[misc]


def _raw_mode(image: Any) -> str:
    """How the pixels of a file that is not loaded yet are written."""
    arguments = image.tile[0][3] if image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _lower_bytes(picture: EncodedPicture, mode: str) -> Image.Image:
    """The lower bytes of 16-bit colours, of which Pillow keeps the upper: read as if they were the other way round."""
    with picture.again() as image:
        tiles: list[Any] = []
        for tile in image.tile:
            arguments = (mode, *tile[3][1:]) if isinstance(tile[3], tuple) else mode
            tiles.append((tile[0], tile[1], tile[2], arguments))
        image.tile = tiles
        load(image)
        return to_rgb(image)
