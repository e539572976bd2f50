"""A line on a terminal that says how far the work is, and that is gone before anything else is written there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from mcv_runtime.command.streams import columns
from mcv_runtime.decoding.ticket import Ticket
from mcv_runtime.progress import Event
from mcv_runtime.request.answer import Answer

_PATIENCE_S, _PAUSE_S = 0.3, 0.1
_CELLS = 24


class ProgressBar:
    """Draws with carriage returns and spaces alone, so that any terminal will do; on no terminal it draws nothing."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._silent = not stream.isatty()
        self._next = clock() + _PATIENCE_S  # what is over sooner needs no bar
        self._drawn = 0
        self._pictures = ""

    def __call__(self, event: Event) -> None:
        """Show how far a request is."""
        if event.stage == "pictures":
            self._pictures = counted(event) + ", " if event.total > 1 else ""
        else:
            total = 0 if event.stage == "answer" else event.total
            self.show((self._pictures if event.stage == "slices" else "") + counted(event), event.done, total)

    def show(self, text: str, done: int, total: int) -> None:
        """Show any work: what it is, and how much of how much is done; 0: nobody knows."""
        now = self._clock()
        if self._silent or now < self._next:
            return
        self._next = now + _PAUSE_S
        room = columns(self._stream) - 1  # a character in the last column would wrap
        cells = min(_CELLS, room - len(text) - 3)
        if total and cells >= 4:
            text += f" [{'#' * (cells * min(done, total) // total):<{cells}}]"
        line = text[:room]
        self._stream.write("\r" + line + " " * (self._drawn - len(line)))
        self._stream.flush()
        self._drawn = len(line)

    def clear(self) -> None:
        """Wipe the line, for something else to be written."""
        if self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._stream.flush()
            self._drawn = 0

    def close(self) -> None:
        """Wipe the line and draw no more."""
        self.clear()
        self._silent = True


def print_answer(ticket: Ticket, bar: ProgressBar) -> Answer:
    """Print an answer as it comes, the bar wiped before its first character where both are on a terminal."""
    while True:
        try:
            piece = next(ticket)
        except StopIteration as end:
            answer: Answer = end.value
            bar.close()
            print()
            return answer
        except BaseException:
            bar.close()  # before what will be said about it
            raise
        if piece and sys.stdout.isatty():
            bar.close()
        print(piece, end="", flush=True)


def counted(event: Event) -> str:
    """How far a request is, in words."""
    if event.stage == "answer":  # its limit says nothing about its length
        return f"answering, {event.done:,} tokens"
    of = f" of {event.total:,}" if event.total else ""
    return f"reading {event.done:,}{of} tokens" if event.stage == "prompt" else f"{event.stage} {event.done:,}{of}"
