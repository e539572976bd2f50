"""Run the decoder: prefill a prompt in chunks, then choose one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.cache import KVCache
from mcv_runtime.errors import OptionError
from mcv_runtime.manifest import Manifest
from mcv_runtime.sessions import Session, feed

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFILL_CHUNK = 512
"""Tokens of a prompt that are read at once: bounds the memory of the activations, not what is computed."""
_CACHE_STEP = 64


class Decoder:
    """The graph `decoder_with_past` for one sequence at a time; holds no state of its own."""

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session = session
        self._entries = manifest.cache
        self._hidden = manifest.hidden_size
        self._context = manifest.text.context_length
        cached = {entry.input for entry in manifest.cache}
        self._fed = {name: spec for name, spec in manifest.graphs["decoder_with_past"].inputs.items() if name not in cached}

    def new_cache(self, tokens: int) -> KVCache:
        """A cache with room for at least `tokens`, which must not exceed the context."""
        rounded = -(-tokens // _CACHE_STEP) * _CACHE_STEP
        return KVCache(self._session, self._entries, min(rounded, self._context))

    def prefill(
        self,
        cache: KVCache,
        ids: NDArray[np.int64],
        vision_embeds: NDArray[np.float32],
        vision_positions: NDArray[np.int64],
        chunk: int = PREFILL_CHUNK,
        positions: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Read a prompt [sequence], its embeddings at the ascending `vision_positions` replaced; logits [vocab] of its end.

        `positions` [3, sequence] of its tokens; None: they follow the tokens before them.
        """
        logits = np.empty((0, 0), np.float32)
        if positions is None:
            positions = np.arange(cache.length, cache.length + len(ids)) + cache.shift
        elif len(ids):
            cache.shift = int(positions.max()) + 1 - (cache.length + len(ids))
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            first, last = np.searchsorted(vision_positions, (start, start + len(part)))
            wanted = [len(part) - 1] if start + len(part) == len(ids) else []
            here = positions[..., start : start + len(part)]
            logits = self._step(cache, part, here, vision_embeds[first:last], vision_positions[first:last] - start, wanted)
        last_logits: NDArray[np.float32] = logits[0]
        return last_logits

    def step(self, cache: KVCache, token: int) -> NDArray[np.float32]:
        """Read one more token; logits [vocab] of what follows it."""
        none = np.empty(0, np.int64)
        embeds = np.empty((0, self._hidden), np.float32)
        here = np.array([cache.length + cache.shift])
        logits: NDArray[np.float32] = self._step(cache, np.array([token]), here, embeds, none, [0])[0]
        return logits

    def _step(
        self,
        cache: KVCache,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        vision_embeds: NDArray[np.float32],
        vision_positions: NDArray[np.int64],
        logit_positions: list[int],
    ) -> NDArray[np.float32]:
        total = cache.length + len(ids)
        if total > cache.capacity:
            raise OptionError(f"the cache holds {cache.capacity} tokens, {total} are needed")
        values = {
            "input_ids": ids[None],
            "vision_embeds": vision_embeds,
            "vision_positions": vision_positions,
            "position_ids": self._position_ids(positions),
            "logit_positions": np.array(logit_positions, np.int64),
            "seqlens_k": np.array([total - 1]),
            "total_sequence_length": np.full([1] * len(self._fed["total_sequence_length"].shape), total),
        }
        return cache.advance(len(ids), feed(self._fed, values))

    def _position_ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[1, T], or [axes, 1, T] where the graph wants it: text has the same position on every axis."""
        axes = self._fed["position_ids"].shape[:-2] if "position_ids" in self._fed else ()
        return np.broadcast_to(positions[..., None, :], (*axes, 1, positions.shape[-1]))  # type: ignore[arg-type]


def greedy(
    first_logits: NDArray[np.float32],
    step: Callable[[int], NDArray[np.float32]],
    *,
    stop: frozenset[int],
    limit: int,
    repetition_penalty: float = 1.0,
) -> Iterator[int]:
    """Yield the likeliest token again and again, until a stop id (which is yielded too) or `limit` tokens.

    The penalty sees generated tokens only, never the prompt: as in the reference, which generates from embeddings.
    """
    logits, seen = first_logits, set[int]()
    for count in range(1, limit + 1):
        token = int(np.argmax(penalised(logits, seen, repetition_penalty)))
        yield token
        if token in stop or count == limit:
            return
        seen.add(token)
        logits = step(token)


def penalised(logits: NDArray[np.float32], seen: set[int], penalty: float) -> NDArray[np.float32]:
    """`logits` with `seen` tokens made less likely: positive ones divided, negative ones multiplied (arXiv:1909.05858)."""
    if penalty == 1.0 or not seen:
        return logits
    ids = np.fromiter(seen, np.int64)
    result = logits.copy()
    result[ids] = np.where(result[ids] > 0, result[ids] / np.float32(penalty), result[ids] * np.float32(penalty))
    return result
