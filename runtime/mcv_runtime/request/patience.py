"""What may end a request early: a deadline, or somebody who cancels it."""

from __future__ import annotations

import time
from typing import Literal

from mcv_runtime.progress import Event, Stage
from mcv_runtime.request.options import Settings


class Interrupted(Exception):  # noqa: N818 - not an error: the request ends with what there is
    """The request shall end now."""

    def __init__(self, reason: Literal["timeout", "cancelled"]) -> None:
        super().__init__(reason)
        self.reason = reason


class Patience:
    """Asked between steps: whether to go on. Reports progress on the way."""

    def __init__(self, settings: Settings) -> None:
        self._progress, self._cancel = settings.progress, settings.cancel
        self._deadline = None if settings.timeout is None else time.monotonic() + settings.timeout

    def check(self) -> None:
        """Raise `Interrupted` if the time is up or the request was cancelled."""
        if self._cancel is not None and self._cancel.is_set():
            raise Interrupted("cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Interrupted("timeout")

    def report(self, stage: Stage, done: int, total: int) -> None:
        """Tell whoever wants to know, then `check`."""
        if self._progress is not None:
            self._progress(Event(stage, done, total))
        self.check()
