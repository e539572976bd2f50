"""The pages of a picture's file: those of a TIFF, the frames of an animation, or the one that there is."""

from __future__ import annotations

import os
from collections.abc import Callable

from PIL import Image

from mcv_runtime.errors import ImageError
from mcv_runtime.pictures.formats import EncodedPicture, check_size, load, read_header, with_all_frames
from mcv_runtime.pictures.images import decode_file, describe, one_line, read_encoded
from mcv_runtime.pictures.levels import to_rgb
from mcv_runtime.pictures.metadata import UPRIGHT
from mcv_runtime.pictures.slicing import Size
from mcv_runtime.pictures.tiff import count_pages


class PictureLeaves:
    """An open file of pictures."""

    def __init__(self, source: str | os.PathLike[str] | bytes, max_pixels: int) -> None:
        """Raises `ImageError` for a file that is no picture."""
        name = describe(source)
        self._frames: EncodedPicture | None = None
        with one_line(name, max_pixels):
            self._data = read_encoded(source, name, max_pixels)
            header = read_header(self._data, name, max_pixels, page=0)
            if header.kind == "TIFF":
                self._count = count_pages(self._data)
            else:
                animated = with_all_frames(header, self._data)
                self._count = int(getattr(animated.image, "n_frames", 1))
                if self._count > 1:
                    self._frames = animated

    def __len__(self) -> int:
        return self._count

    def size(self, index: int, name: str, dpi: float, max_pixels: int) -> Size:
        with one_line(name, max_pixels):
            header = self._header(index, name, max_pixels)
            check_size(header.image.size, name, max_pixels)
            return header.image.size if header.bare.orientation < 5 else header.image.size[::-1]

    def page_size(self, index: int, name: str, max_pixels: int) -> Size:
        return self.size(index, name, 0, max_pixels)

    def draw(self, index: int, name: str, dpi: float, max_pixels: int, check: Callable[[], None]) -> Image.Image:
        with one_line(name, max_pixels):
            header = self._header(index, name, max_pixels)
            if self._frames is None:
                return decode_file(header, name)
            try:
                header.image.seek(index)
            except EOFError:
                raise ImageError(f"{name} cannot be decoded: the animation is cut off") from None
            check_size(header.image.size, name, max_pixels)
            load(header.image)
            upright = UPRIGHT.get(header.bare.orientation)
            rgb = to_rgb(header.image.copy())
            return rgb if upright is None else rgb.transpose(upright)

    def _header(self, index: int, name: str, max_pixels: int) -> EncodedPicture:
        return read_header(self._data, name, max_pixels, page=index) if self._frames is None else self._frames
