"""Who may be computed now, and who waits: so many at a time, clients in turns, and no more waiting than agreed."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque

from mcv_serve.errors import ApiError

_LONGEST_RETRY_S = 120.0


class Admission:
    """Places for `concurrent` requests and a queue of `queue`, from which each client is served in turns."""

    def __init__(self, concurrent: int, queue: int) -> None:
        self._free, self._concurrent, self._most = concurrent, concurrent, queue
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.queued = 0
        self.closed = False
        """Nobody is let in any more."""
        self._mean_s = 1.0
        """How long a place is held."""

    @property
    def running(self) -> int:
        """Places that are taken."""
        return self._concurrent - self._free

    @property
    def retry_after(self) -> float:
        """Seconds until there is room again, about."""
        return min(max(self._mean_s * (1 + self.queued / self._concurrent), 1.0), _LONGEST_RETRY_S)

    def check(self) -> None:
        """Raise `ApiError` if somebody who comes now is not taken."""
        if self.closed:
            raise ApiError(503, "shutting_down", "the server is shutting down; ask again in a while", retry_after=10.0)
        if not self._free and self.queued >= self._most:
            raise ApiError(
                429, "queue_full", f"{self.queued} requests are waiting already; try again later", retry_after=self.retry_after
            )

    async def enter(self, client: str) -> float:
        """Wait for a place; `leave` it with what this gives."""
        self.check()
        if self._free and not self.queued:
            self._free -= 1
            return time.monotonic()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(place)
        self.queued += 1
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._pass_on()
            else:
                self._forget(client, place)
            raise
        return time.monotonic()

    def leave(self, since: float) -> None:
        """Give a place back."""
        self._mean_s += 0.2 * (time.monotonic() - since - self._mean_s)
        self._pass_on()

    def _pass_on(self) -> None:
        """To the client whose turn it is; of one client's, the oldest."""
        while self._waiting:
            client, places = self._waiting.popitem(last=False)
            place = places.popleft()
            if places:
                self._waiting[client] = places  # at the end: others come first
            self.queued -= 1
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def _forget(self, client: str, place: asyncio.Future[None]) -> None:
        places = self._waiting.get(client)
        if places is not None and place in places:
            places.remove(place)
            self.queued -= 1
            if not places:
                del self._waiting[client]
