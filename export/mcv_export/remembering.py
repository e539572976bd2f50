"""A session that does not compute again what it has computed: for a reference that is slow and asked the same often."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from typing import Any

import numpy as np

from mcv_runtime.sessions.graphs import Session

LIMIT = 1 << 30
"""Bytes of results that are kept; the longest unused go first."""


class RememberingSession:
    """Every run over the same inputs gives the same arrays, which nobody may write to."""

    def __init__(self, session: Session, limit: int = LIMIT) -> None:
        self._session, self._left = session, limit
        self._results: OrderedDict[bytes, Any] = OrderedDict()

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> Any:
        digest = sha256(repr(output_names).encode())
        for name in sorted(input_feed):
            array = input_feed[name]
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        key = digest.digest()
        if key in self._results:
            self._results.move_to_end(key)
            return self._results[key]
        result = self._session.run(output_names, input_feed)
        self._results[key] = result
        self._left -= _bytes(result)
        while self._left < 0 and len(self._results) > 1:
            self._left += _bytes(self._results.popitem(last=False)[1])
        return result

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, iobinding: Any) -> None:
        self._session.run_with_iobinding(iobinding)


def _bytes(arrays: Any) -> int:
    return sum(array.nbytes for array in arrays)
