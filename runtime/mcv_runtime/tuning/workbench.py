"""A bundle's graphs with one choice of threads and cache, and how fast they work here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.sessions.graphs import GraphSessions, cpu_session, session_options
from mcv_runtime.vision.encoder import VisionEncoder
from mcv_runtime.vision.picture_cache import PictureCache


class Workbench:
    """Opens a graph when it is first measured, which counts. Pictures and tokens are drawn: the time is the same for all."""

    def __init__(self, bundle: Bundle, threads: int, kv: Literal["float", "int8"] = "float") -> None:
        self.threads, self.kv = threads, kv
        self._manifest = bundle.manifest
        self._sessions = GraphSessions(bundle, session_options(threads), cpu_session)
        graph: GraphName = "decoder_with_past" if kv == "float" else "decoder_with_past_kv8"
        self._decoder = Decoder(self._sessions, bundle.manifest, graph)
        self._rng = np.random.default_rng(0)

    def slice_s(self, batch: int = 1) -> float:
        """Seconds a slice takes, `batch` of them in one run."""
        encoder = VisionEncoder(self._sessions, self._manifest, cache=PictureCache(0), batch_slices=batch)
        side = self._manifest.image.scale_resolution
        pixels = self._rng.integers(0, 255, (batch, side, side, 3), np.uint8)
        pictures = [slice_picture(one, self._manifest.image, max_slice_nums=1) for one in pixels]
        slices = sum(len(picture.slices) for picture in pictures)
        return _seconds(partial(encoder.encode, pictures)) / slices

    def reading_s(self, tokens: int, chunk: int, steps: int = 0) -> tuple[float, float]:
        """Seconds that a token of a prompt takes, read `chunk` at a time, and the fastest of `steps` tokens behind it."""
        slots = self._decoder.new_slots()
        row = self._decoder.new_row(slots, tokens + steps)
        ids = self._rng.integers(0, self._manifest.text.vocab_size, tokens + steps)
        pieces = [ids[start : start + chunk] for start in range(0, tokens, chunk)]
        read = _seconds(lambda: [self._decoder.read(slots, row, piece) for piece in pieces]) / tokens
        took = [_seconds(partial(self._decoder.step, slots, [row], [int(token)])) for token in ids[tokens:]]
        slots.close()
        return read, min(took, default=math.nan)

    @property
    def longest(self) -> int:
        """Tokens that can be read at most, with room for some more."""
        return max(self._manifest.text.context_length - 64, 1)

    def close(self) -> None:
        """Let go of the graphs."""
        self._sessions.close()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
