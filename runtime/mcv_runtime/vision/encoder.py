"""Encode pictures: from a picture's slices to the visual tokens that take their place in a prompt."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.errors import OptionError, ResourceError
from mcv_runtime.pictures.picture import Picture, SlicedPicture
from mcv_runtime.progress import Report, silent
from mcv_runtime.sessions.graphs import Session
from mcv_runtime.vision.picture_cache import Embeds, PictureCache
from mcv_runtime.vision.slice_batches import VISION_MEMORY_MB, BatchPace, BatchSlices, Cell, grouped, slice_bytes
from mcv_runtime.vision.tower import Tower

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WAIT_S = 0.1
"""How often who waits for another thread's picture looks whether to go on."""


class VisionEncoder:
    """Encodes the pictures of a request: each once, its slices in an order and in batches that suit the machine.

    Threads may share an encoder. Their batches take turns, so that the memory is that of one; a picture that one thread
    is encoding is waited for by the others. `hold` surrounds the work on a request's slices.
    """

    def __init__(
        self,
        sessions: Callable[[GraphName], Session],
        manifest: Manifest,
        *,
        cache: PictureCache | None = None,
        identity: str = "",
        batch_slices: BatchSlices = "auto",
        memory_mb: float = VISION_MEMORY_MB,
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`identity`: of the graphs; `batch_slices`: in one run of the tower, but no more than `memory_mb` are enough for."""
        BatchPace(batch_slices, 1)  # complains now
        if not memory_mb > 0:
            raise OptionError(f"vision_memory_mb must be above 0, not {memory_mb}")
        self._image = manifest.image
        self._tokens_per_slice = manifest.placeholder.tokens_per_slice
        self._hidden = manifest.hidden_size
        self._tower = Tower(sessions, manifest)
        self.cache = PictureCache() if cache is None else cache
        self._identity = identity
        self._batch_slices, self._memory_bytes = batch_slices, int(memory_mb * 1e6)
        self._hold = hold
        self._paces: dict[Hashable, BatchPace] = {}
        self._turn = threading.Lock()

    def encode(self, pictures: Sequence[SlicedPicture | Picture], progress: Report | None = None) -> tuple[Picture, ...]:
        """All pictures of one request, those encoded before left as they are.

        Together, because some towers pad every slice to the request's longest one, and see the padding. `progress` hears of
        slices and pictures; what it raises ends the encoding. Raises `ResourceError`, `RunError`.
        """
        report = silent if progress is None else progress
        sizes = [size for picture in pictures if isinstance(picture, SlicedPicture) for size in picture.grid.sizes]
        longest = max((width * height // self._image.patch_size**2 for width, height in sizes), default=0)
        keys = [p.fingerprint if isinstance(p, Picture) else self._key(p, longest) for p in pictures]
        wanted = {key: p for key, p in zip(keys, pictures, strict=True) if isinstance(p, SlicedPicture)}
        embeds = self._embeds(wanted, longest, report)
        return tuple(
            p if isinstance(p, Picture) else Picture(name=p.name, size=p.size, grid=p.grid, embeds=embeds[key], fingerprint=key)
            for key, p in zip(keys, pictures, strict=True)
        )

    def _key(self, picture: SlicedPicture, longest: int) -> str:
        seen = longest if self._image.positions == "strip" else 0
        return hashlib.sha256(f"{picture.fingerprint} {self._identity} {seen}".encode()).hexdigest()

    def _embeds(self, wanted: Mapping[str, SlicedPicture], longest: int, report: Report) -> dict[str, Embeds]:
        """Each picture from the cache, from another thread that is at it, or made here."""
        found: dict[str, Embeds] = {}

        def finish(key: str, embeds: Embeds) -> None:
            found[key] = embeds
            report("pictures", len(found), len(wanted))

        missing = list(wanted)
        while missing:
            mine: list[str] = []
            promised: dict[str, Future[Embeds]] = {}
            try:
                for key in missing:
                    tokens = sum(cell.tokens for cell in self._cells(key, wanted[key]))
                    known = self.cache.claim(key, (tokens, self._hidden))
                    if known is None:
                        mine.append(key)
                    elif isinstance(known, Future):
                        promised[key] = known
                    else:
                        finish(key, known)
                if mine:
                    self._encode({key: wanted[key] for key in mine}, longest, report, finish)
            finally:
                self.cache.release(mine)  # what was not made
            for key, promise in promised.items():  # only now: two threads that wait first could wait for each other
                embeds = _awaited(promise, lambda: report("pictures", len(found), len(wanted)))
                if embeds is not None:
                    finish(key, embeds)
            missing = [key for key in promised if key not in found]  # their thread gave up
        return found

    def _encode(
        self, pictures: Mapping[str, SlicedPicture], longest: int, report: Report, finish: Callable[[str, Embeds], None]
    ) -> None:
        """Make all pictures, put each into the cache as soon as it is complete, and `finish` it."""
        cells = {key: self._cells(key, picture) for key, picture in pictures.items()}
        left = {key: len(of_picture) for key, of_picture in cells.items()}
        made = {key: np.empty((sum(c.tokens for c in some), self._hidden), np.float32) for key, some in cells.items()}
        everything = [cell for some in cells.values() for cell in some]
        done, total = 0, sum(len(cell.frames) for cell in everything)
        with self._hold():
            report("slices", done, total)
            for group in grouped(everything):
                while group:
                    batch, embeds = self._run_batch(group, longest)
                    for cell, tokens in zip(batch, embeds, strict=True):
                        made[cell.picture][cell.start : cell.start + cell.tokens] = tokens
                        left[cell.picture] -= 1
                    group = group[len(batch) :]
                    done += sum(len(cell.frames) for cell in batch)
                    report("slices", done, total)
                    for key in dict.fromkeys(cell.picture for cell in batch):
                        if not left[key]:
                            embeds_of_picture = made.pop(key)
                            self.cache.put(key, embeds_of_picture)
                            finish(key, embeds_of_picture)

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

    def _run_batch(self, group: Sequence[Cell], longest: int) -> tuple[Sequence[Cell], NDArray[np.float32]]:
        """The first cells of a group, as many as are taken at once, and their visual tokens [cells, tokens, hidden]."""
        frames = len(group[0].frames)
        with self._turn:
            pace = self._pace(group[0], longest)
            while True:
                size = pace.next(len(group) if frames == 1 else frames)
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


def _awaited(promise: Future[Embeds], check: Callable[[], object]) -> Embeds | None:
    """What another thread has promised, or None if it gave up; `check` may end the waiting."""
    while True:
        try:
            return promise.result(timeout=_WAIT_S)
        except CancelledError:
            return None
        except TimeoutError:
            check()
