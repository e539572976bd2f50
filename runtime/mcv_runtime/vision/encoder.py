"""Encode pictures: from a picture's slices to the visual tokens that take their place in a prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.bundle.checked import code_version
from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.errors import ResourceError, RunError
from mcv_runtime.pictures.picture import Picture, SlicedPicture
from mcv_runtime.progress import Report, silent
from mcv_runtime.sessions.graphs import Session
from mcv_runtime.vision.picture_cache import Embeds, PictureCache
from mcv_runtime.vision.slice_batches import VISION_MEMORY_BYTES, BatchPace, BatchSlices, Cell, grouped, slice_bytes
from mcv_runtime.vision.tower import Tower

if TYPE_CHECKING:
    from numpy.typing import NDArray


class VisionEncoder:
    """Encodes the pictures of requests: each once, its slices in an order and in batches that suit the machine.

    One thread at a time may use an encoder.
    """

    def __init__(
        self,
        sessions: Callable[[GraphName], Session],
        manifest: Manifest,
        *,
        cache: PictureCache | None = None,
        identity: str = "",
        batch_slices: BatchSlices = "auto",
        memory_bytes: int = VISION_MEMORY_BYTES,
    ) -> None:
        """`identity`: of the graphs; `batch_slices`: in one run of the tower, but only as many as `memory_bytes` hold."""
        BatchPace(batch_slices, 1)  # complains now
        self._image = manifest.image
        self._tokens_per_slice = manifest.placeholder.tokens_per_slice
        self._hidden = manifest.hidden_size
        self._tower = Tower(sessions, manifest)
        self.cache = PictureCache() if cache is None else cache
        self.identity = identity
        self._batch_slices, self._memory_bytes = batch_slices, memory_bytes
        self._paces: dict[Hashable, BatchPace] = {}
        self._claimed: set[str] = set()

    def encode(self, pictures: Sequence[SlicedPicture | Picture], progress: Report | None = None) -> tuple[Picture, ...]:
        """All pictures of one request at once; see `encoding`."""
        encoding = self.encoding(pictures, silent if progress is None else progress)
        while True:
            try:
                next(encoding)
            except StopIteration as end:
                encoded: tuple[Picture, ...] = end.value
                return encoded

    def encoding(
        self,
        pictures: Sequence[SlicedPicture | Picture],
        report: Report = silent,
        at_once: Callable[[], int] = lambda: 1 << 30,
    ) -> Generator[int, None, tuple[Picture, ...]]:
        """All pictures of one request, those encoded before left as they are; yields after each batch how many slices it had.

        Several may be under way in turns: for a picture that one of them makes the others wait, and yield 0. Together, because
        some towers pad every slice to the request's longest one, and see the padding. `report` hears of slices and pictures,
        `at_once` is asked how many slices the next batch may have. Raises `ResourceError`, `RunError`.
        """
        sizes = [size for picture in pictures if isinstance(picture, SlicedPicture) for size in picture.grid.sizes]
        longest = max((width * height // self._image.patch_size**2 for width, height in sizes), default=0)
        keys = [p.fingerprint if isinstance(p, Picture) else self._key(p, longest) for p in pictures]
        wanted = {key: p for key, p in zip(keys, pictures, strict=True) if isinstance(p, SlicedPicture)}
        found: dict[str, Embeds] = {}
        while missing := self._missing(wanted, found, report):
            free = {key: picture for key, picture in missing.items() if key not in self._claimed}
            if not free:
                yield 0
                continue
            self._claimed |= free.keys()
            try:
                for key, embeds, slices in self._made(free, longest, report, at_once):
                    if embeds is not None:
                        self.cache.put(key, embeds)
                        found[key] = embeds
                        report("pictures", len(found), len(wanted))
                    if slices:
                        yield slices
            finally:
                self._claimed -= free.keys()
        return tuple(
            p
            if isinstance(p, Picture)
            else Picture(
                name=p.name, size=p.size, grid=p.grid, embeds=found[key], fingerprint=key, graphs=self.identity, page=p.page
            )
            for key, p in zip(keys, pictures, strict=True)
        )

    def warm_up(self, picture: SlicedPicture) -> None:
        """Run the graphs on a picture, even one that is known, and keep nothing of it."""
        for group in grouped(self._cells("", picture)):
            self._run_batch(group, 0, 1)

    def _missing(
        self, wanted: Mapping[str, SlicedPicture], found: dict[str, Embeds], report: Report
    ) -> dict[str, SlicedPicture]:
        """What is neither `found` nor in the cache, from which `found` is filled."""
        for key in wanted.keys() - found.keys():
            tokens = sum(cell.tokens for cell in self._cells(key, wanted[key]))
            if (known := self.cache.get(key, (tokens, self._hidden))) is not None:
                found[key] = known
                report("pictures", len(found), len(wanted))
        return {key: picture for key, picture in wanted.items() if key not in found}

    def _key(self, picture: SlicedPicture, longest: int) -> str:
        seen = longest if self._image.positions == "strip" else 0
        version = code_version() if self.cache.lasting else ""
        return hashlib.sha256(f"{picture.fingerprint} {self.identity} {seen} {version}".encode()).hexdigest()

    def _made(
        self, pictures: Mapping[str, SlicedPicture], longest: int, report: Report, at_once: Callable[[], int]
    ) -> Iterator[tuple[str, Embeds | None, int]]:
        """Pictures as they are complete, and after each batch how many slices it had."""
        cells = {key: self._cells(key, picture) for key, picture in pictures.items()}
        left = {key: len(of_picture) for key, of_picture in cells.items()}
        made = {key: np.empty((sum(c.tokens for c in some), self._hidden), np.float32) for key, some in cells.items()}
        everything = [cell for some in cells.values() for cell in some]
        done, total = 0, sum(len(cell.frames) for cell in everything)
        if total:
            report("slices", done, total)
        for group in grouped(everything):
            while group:
                batch, embeds = self._run_batch(group, longest, at_once())
                for cell, tokens in zip(batch, embeds, strict=True):
                    made[cell.picture][cell.start : cell.start + cell.tokens] = tokens
                    left[cell.picture] -= 1
                group = group[len(batch) :]
                slices = sum(len(cell.frames) for cell in batch)
                done += slices
                report("slices", done, total)
                for key in dict.fromkeys(cell.picture for cell in batch):
                    if not left[key]:
                        yield key, made.pop(key), 0
                yield "", None, slices

    def _cells(self, key: str, picture: SlicedPicture) -> list[Cell]:
        shapes, count = picture.grid.token_shapes, len(picture.grid.sizes)
        cells, start = [], 0
        for number in range(count):
            tokens = math.prod(shapes[number]) if shapes else self._tokens_per_slice or 0
            frames = picture.slices[number::count]
            cells.append(
                Cell(frames=frames, times=picture.times, mode=picture.downsample_mode, picture=key, start=start, tokens=tokens)
            )
            start += tokens
        return cells

    def _run_batch(self, group: Sequence[Cell], longest: int, at_once: int) -> tuple[Sequence[Cell], NDArray[np.float32]]:
        """The first cells of a group, as many as are taken at once, and their visual tokens [cells, tokens, hidden]."""
        frames = len(group[0].frames)
        pace = self._pace(group[0], longest)
        while True:
            size = min(pace.next(len(group) if frames == 1 else frames), at_once)
            batch = group[:size] if frames == 1 else group[:1]
            start = pace.clock()
            try:
                embeds = self._tower.encode(batch, size, longest)
            except MemoryError as error:
                if size == 1:
                    width, height = group[0].size
                    raise ResourceError(
                        f"there is not enough memory to encode a slice of {width} x {height} pixels;"
                        " end other programs, or use low_memory or a smaller model"
                    ) from error
            else:
                pace.took(size, (pace.clock() - start) / (len(batch) * frames))
                if not np.isfinite(embeds).all():
                    raise RunError("the tower gave numbers that are none (NaN or infinity); its weights are damaged")
                return batch, embeds
            pace.failed(size)  # here, where nothing holds on to the memory of the attempt

    def _pace(self, cell: Cell, longest: int) -> BatchPace:
        width, height = cell.size
        patches = width * height // self._image.patch_size**2
        if self._image.positions == "strip":
            patches = max(patches, longest)
        key = (cell.mode, cell.size, patches, len(cell.frames))
        if key not in self._paces:
            most = self._memory_bytes // slice_bytes(self._tower.graph(cell.mode), patches)
            self._paces[key] = BatchPace(self._batch_slices, most)
        return self._paces[key]
