"""How long a request may take: its deadline, and whoever may cancel it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

Ending: TypeAlias = Literal["timeout", "cancelled"]
"""Why a request ends before its answer does."""


class Interrupted(Exception):  # noqa: N818 - not an error: the request ends with what there is
    """The request shall end now."""

    def __init__(self, reason: Ending) -> None:
        super().__init__(reason)
        self.reason = reason


class Patience:
    """Asked between steps: whether the time is up (`timeout` in seconds from now) or somebody has cancelled.

    With `own_time` the clock stands still while others alone are worked for: between `hold` and `resume`, and as `pause` tells.
    """

    def __init__(
        self,
        timeout: float | None,
        cancel: threading.Event | None,
        *,
        own_time: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cancel, self._own_time, self._clock = cancel, own_time, clock
        self._deadline = None if timeout is None else clock() + timeout
        self._held_since: float | None = None

    @property
    def ending(self) -> Ending | None:
        """Why it has run out, if it has."""
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        late = self._deadline is not None and self._held_since is None and self._clock() > self._deadline
        return "timeout" if late else None

    def check(self) -> None:
        """Raise `Interrupted` if it has run out."""
        if reason := self.ending:
            raise Interrupted(reason)

    def hold(self) -> None:
        """From now on others come first."""
        if self._own_time:
            self._held_since = self._clock()

    def resume(self) -> None:
        """Now it is worked for."""
        if self._held_since is not None:
            since, self._held_since = self._held_since, None
            self.pause(self._clock() - since)

    def pause(self, seconds: float) -> None:
        """So long only others were worked for."""
        if self._own_time and self._deadline is not None:
            self._deadline += seconds
