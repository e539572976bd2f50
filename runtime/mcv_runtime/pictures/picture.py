"""Pictures and videos cut into slices, and what is left of them when they are encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from mcv_runtime.bundle.manifest import ImageSpec, SmallImageUpsize
from mcv_runtime.errors import ImageError, OptionError, shown
from mcv_runtime.pictures.images import MAX_PIXELS, ImageSource, describe, open_picture
from mcv_runtime.pictures.patches import cut
from mcv_runtime.pictures.slicing import Size, SliceGrid, adaptive_grid
from mcv_runtime.pictures.upsizing import keep_small, smallest

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PictureChoices(Protocol):
    """What a request may say about how its pictures are cut; None: as the bundle says."""

    @property
    def max_slice_nums(self) -> int | None: ...

    @property
    def downsample_mode(self) -> str | None: ...

    @property
    def small_image_upsize(self) -> SmallImageUpsize | None: ...


STILL = -1
"""The time of a patch that is not of a video."""
MAX_STRETCH = 4
"""Most pixels of a slice of a very long and narrow picture, against a square one's: attention's memory is quadratic."""


@dataclass(frozen=True, slots=True)
class PagePlace:
    """Which page of a document a picture is."""

    number: int
    """From 1."""
    size: Size
    """(width, height) in what places on it are told in: points of a PDF (a 72th of an inch), else pixels."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlicedPicture:
    """A picture cut into RGB slices, not yet encoded."""

    name: str
    size: Size
    grid: SliceGrid
    slices: tuple[Image.Image, ...]
    """Of a pack of frames, frame after frame."""
    downsample_mode: str | None = None
    times: tuple[int, ...] = (STILL,)
    """One for each frame of a pack: its patches say when they were."""
    page: PagePlace | None = None
    fingerprint: str = field(init=False)
    """The same for the same slices, grid, mode and times, whatever the file was."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", _fingerprint(self))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """An encoded picture: give it to `ask` or `stream` as often as you like, it is not encoded again."""

    name: str
    size: Size
    """(width, height) in pixels, upright."""
    grid: SliceGrid
    embeds: NDArray[np.float32]
    """[visual tokens, hidden], slice after slice; not to be written to."""
    fingerprint: str
    """64 hex digits, the same for pictures that were encoded alike: equal slices, mode, times, graphs, and padding if seen."""
    graphs: str
    """Of the graphs that encoded it: those of another bundle give visual tokens that another decoder reads."""
    page: PagePlace | None = None
    """Of a document; None: a picture of its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A video as pictures in the order of time: give it to `ask` as often as you like, it is not encoded again."""

    name: str
    frames: tuple[SlicedPicture | Picture, ...]


def slice_picture(
    source: ImageSource,
    image: ImageSpec,
    *,
    max_slice_nums: int | None = None,
    max_pixels: int = MAX_PIXELS,
    downsample_mode: str | None = None,
    small_image_upsize: SmallImageUpsize | None = None,
    name: str | None = None,
    page: PagePlace | None = None,
    check: Callable[[], None] = lambda: None,
) -> SlicedPicture:
    """Open a picture and cut it; only the slices, which have a bounded size, stay in memory.

    `name` and `page` are those of a document's page. `check` is called between these steps, and may raise.
    """
    name = describe(source) if name is None else name
    picture = open_picture(source, max_pixels)
    check()
    mode = image.downsample_mode if downsample_mode is None else downsample_mode
    grid = picture_grid(picture.size, image, max_slice_nums=max_slice_nums, downsample_mode=mode)
    _require_compact(name, picture.size, grid, image)
    pieces: list[Image.Image] = []
    for piece in cut(picture, grid):
        pieces.append(piece)
        check()
    slices: Sequence[Image.Image] = pieces
    upsize = image.small_image_upsize if small_image_upsize is None else small_image_upsize
    if upsize != "always":
        grid, slices = keep_small(picture, grid, slices, image, adaptive=upsize == "adaptive")
    return SlicedPicture(name=name, size=picture.size, grid=grid, slices=tuple(slices), downsample_mode=mode, page=page)


def picture_grid(
    size: Size, image: ImageSpec, *, max_slice_nums: int | None = None, downsample_mode: str | None = None
) -> SliceGrid:
    """How a picture of `size` is cut, which says how many visual tokens it makes at most (small ones may be left smaller)."""
    mode = image.downsample_mode if downsample_mode is None else downsample_mode
    if mode is not None and mode not in image.downsample:
        known = ", ".join(image.downsample) or "no such choice"
        raise OptionError(f"downsample_mode={shown(mode)}: this model has {known}")
    unit = None if mode is None else image.downsample[mode].merge * image.patch_size
    return adaptive_grid(size, image, max_slice_nums, unit)


def least_grid(name: str, size: Size, image: ImageSpec, options: PictureChoices) -> SliceGrid:
    """How a picture of `size` is cut if none of it is enlarged for the text in it, which only its pixels can tell.

    Raises `ImageError` for one that is too long and narrow.
    """
    grid = picture_grid(size, image, max_slice_nums=options.max_slice_nums, downsample_mode=options.downsample_mode)
    _require_compact(name, size, grid, image)
    upsize = image.small_image_upsize if options.small_image_upsize is None else options.small_image_upsize
    return grid if upsize == "always" else smallest(size, grid, image, adaptive=upsize == "adaptive")


def _require_compact(name: str, size: Size, grid: SliceGrid, image: ImageSpec) -> None:
    if max(width * height for width, height in grid.sizes) > MAX_STRETCH * image.scale_resolution**2:
        raise ImageError(f"{name} is too long and narrow ({size[0]} x {size[1]}); cut it into pieces")


def pack(frames: Sequence[SlicedPicture], times: tuple[int, ...]) -> SlicedPicture:
    """One picture of frames that are compressed together; without times, of the one frame there is."""
    first = frames[0]
    if not times:
        return first
    if any(frame.grid != first.grid for frame in frames):
        raise ImageError("the frames of a video differ in size, so they cannot be packed")
    return replace(first, slices=tuple(piece for frame in frames for piece in frame.slices), times=times)


def _fingerprint(picture: SlicedPicture) -> str:
    described = (picture.downsample_mode, picture.times, picture.grid, [piece.size for piece in picture.slices])
    digest = hashlib.sha256(repr(described).encode())
    for piece in picture.slices:
        digest.update(piece.tobytes())
    return digest.hexdigest()
