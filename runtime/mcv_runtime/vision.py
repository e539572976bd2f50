"""Encode pictures: from a picture's slices to the visual tokens that take their place in a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mcv_runtime.errors import ImageError, OptionError
from mcv_runtime.images import MAX_PIXELS, ImageSource, describe, open_picture
from mcv_runtime.manifest import GraphName, ImageSpec, Manifest, SmallImageUpsize
from mcv_runtime.nesting import nested_order
from mcv_runtime.patches import PatchedSlice, cut, patch_slice
from mcv_runtime.sessions import Session, feed
from mcv_runtime.slicing import Size, SliceGrid, adaptive_grid
from mcv_runtime.upsizing import keep_small

if TYPE_CHECKING:
    from numpy.typing import NDArray

STILL = -1
"""The time of a patch that is not of a video."""
MAX_STRETCH = 4
"""Most pixels of a slice of a very long and narrow picture, against a square one's: attention's memory is quadratic."""


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """An encoded picture: give it to `ask` or `stream` as often as you like, it is not encoded again."""

    name: str
    size: Size
    """(width, height) in pixels, upright."""
    grid: SliceGrid
    embeds: NDArray[np.float32]
    """[visual tokens, hidden], slice after slice."""


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
) -> SlicedPicture:
    """Open a picture and cut it; only the slices, which have a bounded size, stay in memory."""
    picture = open_picture(source, max_pixels)
    mode = image.downsample_mode if downsample_mode is None else downsample_mode
    if mode is not None and mode not in image.downsample:
        known = ", ".join(image.downsample) or "no such choice"
        raise OptionError(f"downsample_mode={mode!r}: this model has {known}")
    unit = None if mode is None else image.downsample[mode].merge * image.patch_size
    grid = adaptive_grid(picture.size, image, max_slice_nums, unit)
    if max(width * height for width, height in grid.sizes) > MAX_STRETCH * image.scale_resolution**2:
        raise ImageError(f"{describe(source)} is too long and narrow ({picture.width} x {picture.height}); cut it into pieces")
    slices = tuple(cut(picture, grid))
    upsize = image.small_image_upsize if small_image_upsize is None else small_image_upsize
    if upsize != "always":
        grid, slices = keep_small(picture, grid, slices, image, adaptive=upsize == "adaptive")
    return SlicedPicture(name=describe(source), size=picture.size, grid=grid, slices=slices, downsample_mode=mode)


def pack(frames: Sequence[SlicedPicture], times: tuple[int, ...]) -> SlicedPicture:
    """One picture of frames that are compressed together; without times, of the one frame there is."""
    first = frames[0]
    if not times:
        return first
    if any(frame.grid != first.grid for frame in frames):
        raise ImageError("the frames of a video differ in size, so they cannot be packed")
    return replace(first, slices=tuple(piece for frame in frames for piece in frame.slices), times=times)


class VisionEncoder:
    """The tower and what compresses its output, one slice at a time: batches cost memory and gained no speed.

    `sessions` opens a graph when it is first needed: most requests use one downsample mode.
    """

    def __init__(self, sessions: Callable[[GraphName], Session], manifest: Manifest) -> None:
        self._sessions = sessions
        self._image = manifest.image
        self._graphs = manifest.graphs
        self._compressor = manifest.compressor

    def encode(self, pictures: Sequence[SlicedPicture | Picture]) -> tuple[Picture, ...]:
        """All pictures of one request, those encoded before left as they are.

        Together, because some towers pad every slice to the request's longest one, and see the padding.
        """
        sizes = [size for picture in pictures if isinstance(picture, SlicedPicture) for size in picture.grid.sizes]
        longest = max((width * height // self._image.patch_size**2 for width, height in sizes), default=0)
        return tuple(p if isinstance(p, Picture) else self._encode(p, longest) for p in pictures)

    def _encode(self, picture: SlicedPicture, longest: int) -> Picture:
        count = len(picture.grid.sizes)
        embeds = np.concatenate([self._encode_pack(picture, number, longest) for number in range(count)])
        return Picture(name=picture.name, size=picture.size, grid=picture.grid, embeds=embeds)

    def _encode_pack(self, picture: SlicedPicture, number: int, longest: int) -> NDArray[np.float32]:
        """Visual tokens [tokens per slice, hidden] of one slice, of all frames of the pack together."""
        seen = []
        for piece, time in zip(picture.slices[number :: len(picture.grid.sizes)], picture.times, strict=True):
            patches = patch_slice(piece, self._image, longest)
            seen.append(self._look(patches, time, picture.downsample_mode))
        axes = {"vision_hidden": 1, "patch_positions": 0, "patch_times": 0}
        offered = {name: np.concatenate([one[name] for one in seen], axis) for name, axis in axes.items()}
        embeds: NDArray[np.float32] = self._run(self._compressor, "vision_embeds", offered)[0]
        return embeds

    def _look(self, patches: PatchedSlice, time: int, mode: str | None) -> dict[str, NDArray[Any]]:
        """What the tower makes of a slice, and what else compressing it takes."""
        count = patches.rows * patches.columns
        offered: dict[str, NDArray[Any]] = {
            "pixel_values": patches.pixel_values[None],
            "position_ids": patches.position_ids[None],
            "row_weights": patches.row_weights,
            "column_weights": patches.column_weights,
            "patch_positions": patches.patch_positions,
            "patch_times": np.full(count, time),
        }
        vision: GraphName = "vision_encoder"
        if mode is not None:
            vision = self._image.downsample[mode].graph
            order = nested_order(patches.rows, patches.columns, self._image.downsample[mode].merge)
            offered |= {name: offered[name][:, order] for name in ("pixel_values", "position_ids")}
        return offered | {"vision_hidden": self._run(vision, "vision_hidden", offered)[:, :count]}

    def _run(self, graph: GraphName, output: str, offered: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        (result,) = self._sessions(graph).run([output], feed(self._graphs[graph].inputs, offered))
        array: NDArray[np.float32] = result
        return array
