"""In which order, and how many at a time, the slices of a request go through the graphs."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from PIL import Image

from mcv_runtime.bundle.manifest import GraphSpec
from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.slicing import Size

BatchSlices: TypeAlias = int | Literal["auto"]
VISION_MEMORY_BYTES = 512_000_000
"""Six slices of 448 x 448 pixels in SigLIP so400m: 74 MB each were measured in a batch, at no gain (2.3 s each, two cores)."""

_LIVE = 16
"""Tensors as wide as the tower that a run holds at its peak: its MLP is 4 wide, attention's scores are as large again."""
_SAMPLES = 2
"""Runs of a size that are timed: the first may be slower, so the faster counts."""
_LARGEST = 4
"""Slices that a trial takes at once: what they do not gain, more do not either."""
_GAIN = 0.95
"""A batch must take less than this share of the time of as many single slices to be worth its memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cell:
    """One slice of a picture; of a pack of frames, the same slice of each frame."""

    frames: tuple[Image.Image, ...]
    times: tuple[int, ...]
    """Of each frame."""
    mode: str | None
    picture: str
    """Key of the picture."""
    start: int
    """Which of the picture's visual tokens is the first of this cell."""
    tokens: int
    """Visual tokens of this cell."""

    @property
    def size(self) -> Size:
        return self.frames[0].size


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that may share a run: of one size, mode and moment, in the order of the first of each group."""
    groups: dict[tuple[str | None, Size, tuple[int, ...]], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.mode, cell.size, cell.times), []).append(cell)
    return list(groups.values())


def slice_bytes(tower: GraphSpec, patches: int) -> int:
    """Memory that one slice takes in the tower's activations, about: what a batch costs for each slice more."""
    width = tower.outputs["vision_hidden"].shape[-1]
    pixels = tower.inputs["pixel_values"].shape[-1]
    return 4 * patches * (_LIVE * int(width) + int(pixels))


class BatchPace:
    """How many equal slices to encode at once: a fixed number, or what turns out to be faster on real slices.

    `most` is what fits into the memory that was granted. One thread at a time may use it.
    """

    def __init__(self, wanted: BatchSlices, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        if wanted != "auto" and wanted < 1:
            raise OptionError(f"batch_slices must be at least 1 or 'auto', not {wanted}")
        self.most = max(most, 1)
        self.clock = clock
        self._wanted = wanted
        self._trial = 0
        self._runs: defaultdict[int, tuple[int, float]] = defaultdict(lambda: (0, math.inf))
        """How often so many at once were timed, and the fastest time for each slice."""
        self._decision: int | None = None

    @property
    def decision(self) -> int | None:
        """What was found faster; None: not known yet."""
        return self._decision

    def next(self, remaining: int) -> int:
        """Slices to take now, of so many that are left."""
        most = min(self.most, remaining)
        if self._wanted != "auto":
            return min(self._wanted, most)
        if self._decision is not None:
            return min(self._decision, most)
        if self._runs[1][0] < _SAMPLES:
            return 1
        if not self._trial:
            size = min(_LARGEST, most, remaining // _SAMPLES)
            self._trial = size if size > 1 else 0
        return self._trial if 1 < self._trial <= most else 1

    def took(self, size: int, seconds: float) -> None:
        """A run of `size` slices was that fast, for each slice."""
        count, best = self._runs[size]
        self._runs[size] = count + 1, min(best, seconds)
        if self._decision is None and self._trial and self._runs[self._trial][0] >= _SAMPLES:
            faster = self._runs[self._trial][1] < _GAIN * self._runs[1][1]
            self._decision = self._trial if faster else 1

    def failed(self, size: int) -> None:
        """There was no memory for so many: never try as many again."""
        self.most = max(size // 2, 1)
        self._trial = 0
