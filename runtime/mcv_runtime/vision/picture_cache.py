"""Not encoding a picture twice: what was encoded, found again by its content."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.vision.picture_store import PictureStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

Embeds: TypeAlias = "NDArray[np.float32]"
PICTURE_CACHE_MB = 256
CACHE_DIR_MB = 1024


class PictureCache:
    """Embeddings by key, at most `limit_bytes` of them in memory and more in a `store`, the least recently used gone first.

    Threads may share it. A key that one thread is encoding is not given to a second one: that gets the first one's future.
    """

    def __init__(self, limit_bytes: int = 0, store: PictureStore | None = None) -> None:
        self._limit, self._store = limit_bytes, store
        self._kept: OrderedDict[str, Embeds] = OrderedDict()
        self._bytes = 0
        self._claimed: dict[str, Future[Embeds]] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of embeddings in memory."""
        return self._bytes

    def clear(self) -> None:
        """Forget what is in memory; the store keeps its own."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def claim(self, key: str, shape: tuple[int, int] | None = None) -> Embeds | Future[Embeds] | None:
        """What is known of a picture: its embeddings, another thread's promise of them, or None: now the caller must make it.

        After None, the caller must `put` the key, or `release` it. `shape`: that the embeddings must have.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            if key in self._claimed:
                return self._claimed[key]
            self._claimed[key] = Future()
        try:
            found = None if self._store is None else self._store.get(key, shape)
        except BaseException:  # no memory, Ctrl-C
            self.release([key])
            raise
        if found is not None:
            self._settle(key, found)
        return found

    def put(self, key: str, embeds: Embeds) -> None:
        """Keep a claimed picture, and give it to those who wait for it; `embeds` must not be changed any more."""
        embeds.flags.writeable = False  # threads share it
        self._settle(key, embeds)
        if self._store is not None:
            self._store.put(key, embeds)

    def release(self, keys: Iterable[str]) -> None:
        """Give up what was claimed and not put: whoever waits for it makes it himself."""
        with self._lock:
            for key in keys:
                if future := self._claimed.pop(key, None):
                    future.cancel()

    def _settle(self, key: str, embeds: Embeds) -> None:
        with self._lock:
            if embeds.nbytes <= self._limit:
                self._kept[key] = embeds
                self._bytes += embeds.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
            future = self._claimed.pop(key)
        future.set_result(embeds)


def vision_identity(bundle: Bundle) -> str:
    """What tells graphs apart that encode pictures differently: a sha256 over their files and how pixels are prepared."""
    manifest = bundle.manifest
    digests = {}
    for name, graph in manifest.graphs.items():
        if name.startswith("decoder"):
            continue
        paths = bundle.path(graph.file).parent.glob(f"{bundle.path(graph.file).name}*")  # the graph, and its weights
        for path in sorted(paths):
            file = path.relative_to(bundle.folder).as_posix()
            digests[file] = manifest.files[file].sha256 if file in manifest.files else _file_sha256(path)
    described = json.dumps([asdict(manifest.image), digests], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
