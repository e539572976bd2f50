"""Not encoding a picture twice: what was encoded, found again by its content."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.vision.picture_store import PictureStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

Embeds: TypeAlias = "NDArray[np.float32]"
CACHE_DIR_MB = 1024


class PictureCache:
    """Embeddings by key, at most `limit_bytes` of them in memory and more in a `store`, the least recently used gone first.

    What a running request holds is found as well. One thread at a time may use it.
    """

    def __init__(self, limit_bytes: int = 0, store: PictureStore | None = None) -> None:
        self._limit, self._store = limit_bytes, store
        self._kept: OrderedDict[str, Embeds] = OrderedDict()
        self._alive: WeakValueDictionary[str, Embeds] = WeakValueDictionary()
        self.nbytes = 0
        """Bytes of embeddings that are kept in memory."""

    @property
    def lasting(self) -> bool:
        """Whether what it keeps outlives this process."""
        return self._store is not None

    def clear(self) -> None:
        """Forget what is in memory; the store keeps its own."""
        self._kept.clear()
        self._alive.clear()
        self.nbytes = 0

    def get(self, key: str, shape: tuple[int, int] | None = None) -> Embeds | None:
        """The embeddings of a picture, if they are known, of the `shape` [visual tokens, hidden] that they must have."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._alive.get(key)
        if found is None and self._store is not None:
            found = self._store.get(key, shape)
        if found is not None:
            self._keep(key, found)
        return found

    def put(self, key: str, embeds: Embeds) -> None:
        """Keep a picture; `embeds` must not be changed any more."""
        self._keep(key, embeds)
        if self._store is not None:
            self._store.put(key, embeds)

    def _keep(self, key: str, embeds: Embeds) -> None:
        embeds.flags.writeable = False  # requests share it
        self._alive[key] = embeds
        if key not in self._kept and embeds.nbytes <= self._limit:
            self._kept[key] = embeds
            self.nbytes += embeds.nbytes
        while self.nbytes > self._limit:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


def vision_identity(bundle: Bundle, provider: str) -> str:
    """What tells apart who encodes pictures differently: a sha256 over graphs, how pixels are prepared and what computes."""
    manifest = bundle.manifest
    graphs = [graph.file for name, graph in manifest.graphs.items() if not name.startswith("decoder")]
    digests = {name: file.sha256 for name, file in manifest.files.items() if name.startswith(tuple(graphs))}  # with weights
    described = json.dumps([asdict(manifest.image), digests, provider.strip().lower()], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()
