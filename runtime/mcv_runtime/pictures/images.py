"""Open any picture as plain RGB, within a pixel limit, or say in one line why not."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mcv_runtime.errors import ImageError, OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

MAX_PIXELS = 64_000_000
_EXECUTING_FORMATS = frozenset({"EPS"})
"""Pillow decodes these by starting another program (Ghostscript) on the file."""


def describe(source: ImageSource) -> str:
    """What to call a picture in a message."""
    return str(source) if isinstance(source, str | os.PathLike) else f"the given {type(source).__name__}"


def open_picture(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture from a path, encoded bytes, a Pillow image or an array [H, W], [H, W, 3] or [H, W, 4] of uint8.

    Transparency is dropped, as the reference does. Raises `ImageError`; the limit is checked before anything is decoded.
    """
    if max_pixels < 1:
        raise OptionError(f"max_pixels must be at least 1, not {max_pixels}")
    name = describe(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, max_pixels)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)):
            raise ImageError(f"{name} has shape {source.shape} of {source.dtype}; give [H, W], [H, W, 3] or [H, W, 4] of uint8")
        if 0 in source.shape:
            raise ImageError(f"{name} has no pixels (shape {source.shape})")
        return _decode(Image.fromarray(np.ascontiguousarray(source)), name, max_pixels)
    if not isinstance(source, bytes | str | os.PathLike):
        raise ImageError(f"{name} is not a picture: give a path, bytes, a Pillow image or a numpy array")
    if isinstance(source, bytes):
        if not source:
            raise ImageError(f"{name} are empty")
        return _decode_file(io.BytesIO(source), name, max_pixels)
    path = Path(source)
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{name} is an empty file")
        with path.open("rb") as file:
            return _decode_file(file, name, max_pixels)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decode_file(file: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        with Image.open(file) as image:
            if image.format in _EXECUTING_FORMATS:
                raise ImageError(f"{name} is an {image.format} file, which is not supported")
            return _decode(image, name, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture, or of a kind that is not supported") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large: Pillow refuses it as a decompression bomb") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        raise ImageError(f"{name} cannot be decoded: {_one_line(error)}") from error


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is too large: {width} x {height} is more than {max_pixels:,} pixels; shrink it or raise max_pixels"
        )
    try:
        return _to_rgb(_upright(image))
    except Exception as error:  # as above; a Pillow image may also be still unread, or closed
        raise ImageError(f"{name} cannot be decoded: {_one_line(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # damaged metadata does not spoil the pixels
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip instead of scaling, and a 16-bit picture would come out white
        levels = np.nan_to_num(np.asarray(image).astype(np.float32))
        top = levels.max()
        scale = 1 / 257 if image.mode.startswith("I;16") or top > 255 else 255 if image.mode == "F" and top <= 1 else 1
        image = Image.fromarray(np.clip(levels * scale, 0, 255).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
