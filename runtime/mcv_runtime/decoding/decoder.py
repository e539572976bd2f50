"""Run the decoder: read a prompt in chunks, then one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.decoding.cache import KVCache
from mcv_runtime.errors import OptionError
from mcv_runtime.sessions.graphs import Session, feed

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFILL_CHUNK = 512
"""Tokens of a prompt that are read at once: bounds the memory of the activations, not what is computed."""
_CACHE_STEP = 64


class Decoder:
    """A decoder graph, by default `decoder_with_past`; holds no state of its own, so threads may share it."""

    def __init__(self, session: Session, manifest: Manifest, graph: GraphName = "decoder_with_past") -> None:
        self._session = session
        inputs = manifest.graphs[graph].inputs
        # the same tensors for every decoder graph, but not of the same type
        self._entries = tuple(replace(entry, dtype=inputs[entry.input].dtype) for entry in manifest.cache)
        self._hidden = manifest.hidden_size
        self._context = manifest.text.context_length
        cached = {entry.input for entry in manifest.cache}
        self._fed = {name: spec for name, spec in inputs.items() if name not in cached}

    def room(self, tokens: int) -> int:
        """The capacity of a cache for at least `tokens`, which must not exceed the context."""
        rounded = -(-tokens // _CACHE_STEP) * _CACHE_STEP
        return min(rounded, self._context)

    def new_cache(self, tokens: int, rows: int = 1) -> KVCache:
        """An empty cache with room for at least `tokens`."""
        return KVCache(self._session, self._entries, self.room(tokens), rows)

    def prefill(
        self,
        cache: KVCache,
        ids: NDArray[np.int64],
        vision_embeds: NDArray[np.float32],
        vision_positions: NDArray[np.int64],
        chunk: int = PREFILL_CHUNK,
        positions: NDArray[np.int64] | None = None,
        check: Callable[[int], None] = lambda done: None,
    ) -> NDArray[np.float32]:
        """Read a prompt [sequence], its embeddings at the ascending `vision_positions` replaced; logits [vocab] of its end.

        `positions` [3, sequence] of its tokens; None: they follow the tokens before them. `check` gets the tokens done after
        each chunk; what it raises ends the reading, and the cache holds the chunks so far.
        """
        logits = np.empty((0, 0), np.float32)
        if positions is None:
            positions = np.arange(cache.length, cache.length + len(ids)) + cache.shifts[0]
        elif len(ids):
            cache.shifts[0] = int(positions.max()) + 1 - (cache.length + len(ids))
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            first, last = np.searchsorted(vision_positions, (start, start + len(part)))
            wanted = [len(part) - 1] if start + len(part) == len(ids) else []
            here = positions[..., None, start : start + len(part)]
            embeds, places = vision_embeds[first:last], vision_positions[first:last] - start
            logits = self._step(cache, part[None], here, embeds, places, wanted)
            check(start + len(part))
        last_logits: NDArray[np.float32] = logits[0]
        return last_logits

    def read(self, cache: KVCache, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read more tokens of the only row; logits [tokens, vocab] of what follows each."""
        here = np.arange(cache.length, cache.length + len(tokens))[None] + cache.shifts[0]
        return self._text(cache, np.array([tokens], np.int64), here)

    def step(self, cache: KVCache, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read one more token of each row; logits [rows, vocab] of what follows."""
        return self._text(cache, np.array(tokens, np.int64)[:, None], (cache.lengths + cache.shifts)[:, None])

    def _text(self, cache: KVCache, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        embeds, none = np.empty((0, self._hidden), np.float32), np.empty(0, np.int64)
        return self._step(cache, ids, positions, embeds, none, range(ids.size))

    def _step(
        self,
        cache: KVCache,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        vision_embeds: NDArray[np.float32],
        vision_positions: NDArray[np.int64],
        logit_positions: Sequence[int],
    ) -> NDArray[np.float32]:
        """ids [rows, T], positions [rows, T] or [3, rows, T]."""
        totals = cache.lengths + ids.shape[1]
        total = int(totals.max())
        if total > cache.capacity:
            raise OptionError(f"the cache holds {cache.capacity} tokens, {total} are needed")
        values = {
            "input_ids": ids,
            "vision_embeds": vision_embeds,
            "vision_positions": vision_positions,
            "position_ids": self._position_ids(positions),
            "logit_positions": np.array(logit_positions, np.int64),
            "seqlens_k": totals - 1,
            "total_sequence_length": np.full([1] * len(self._fed["total_sequence_length"].shape), total),
        }
        return cache.advance(ids.shape[1], feed(self._fed, values))

    def _position_ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[rows, T], or [axes, rows, T] where the graph wants it: text has the same position on every axis."""
        axes = self._fed["position_ids"].shape[:-2] if "position_ids" in self._fed else ()
        return np.broadcast_to(positions, (*axes, *positions.shape[-2:]))  # type: ignore[arg-type]
