"""The answers of a batch on disk, one JSON object a line in the order of the rows, so that a later run can go on.

What is finished is found again by the digest of its request: a row that was edited, failed or is new is done, and the rest
is taken over. Rows that are there but not at their place wait in a second file, `NAME.rest`, until their turn comes; it is
gone when all is done.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mcv_runtime.command.batch_input import BatchRow
from mcv_runtime.errors import OutputError

_WINDOW = 1000
"""Finished rows among which the next is looked for: as many may have been deleted or edited in a row."""


class BatchOutput:
    """Takes the answers of rows in their order; a context, in which the file is open."""

    def __init__(self, path: Path) -> None:
        self.path, self._rest_path = path, path.with_name(f"{path.name}.rest")
        self.kept = 0
        """Rows that were there already."""

    def __enter__(self) -> Self:
        try:
            self._file: BinaryIO = self.path.open("r+b" if self.path.exists() else "w+b")
        except OSError as error:
            raise self._unwritable(error) from None
        self._refuse_others()
        self._end = 0
        self._rest: Iterator[dict[str, Any]] = iter(())
        self._window: deque[dict[str, Any]] = deque()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if isinstance(self._rest, _Lines):
            self._rest.close()

    def has(self, row: BatchRow) -> bool:
        """Whether the row's answer is there at its place; rows must be asked about in order, until one is not."""
        start = self._end
        self._file.seek(start)
        line = self._file.readline()
        there = _finished(line)
        if there is None or there["request"] != row.digest or there["row"] != row.number:
            return False
        self._end = start + len(line)
        self.kept += 1
        return True

    def settle(self) -> None:
        """No more rows are in place: what follows is put aside, an incomplete last line cut off."""
        try:
            self._file.seek(self._end)
            first = self._file.readline()
            if first.endswith(b"\n"):
                partial = self._rest_path.with_name(f"{self._rest_path.name}.partial")
                with partial.open("wb") as aside:
                    aside.write(first)
                    _copy(self._file, aside)
                    if self._rest_path.exists():
                        with self._rest_path.open("rb") as older:
                            _copy(older, aside)
                partial.replace(self._rest_path)
            self._file.truncate(self._end)
            self._file.seek(self._end)
            if self._rest_path.exists():
                self._rest = _Lines(self._rest_path)
        except OSError as error:
            raise self._unwritable(error) from None

    def earlier(self, row: BatchRow) -> dict[str, Any] | None:
        """The answer to the same request from an earlier run, once."""
        while True:
            while len(self._window) < _WINDOW and (line := next(self._rest, None)) is not None:
                self._window.append(line)
            for place, there in enumerate(self._window):
                if there["request"] == row.digest:
                    for _ in range(place + 1):
                        self._window.popleft()
                    self.kept += 1
                    return {**there, "row": row.number}
            if len(self._window) == _WINDOW:  # make room, or what is behind is never found
                self._window.popleft()
            return None

    def write(self, answer: dict[str, Any]) -> None:
        """Write the next row's answer; it is on disk when this returns."""
        try:
            self._file.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def finish(self) -> None:
        """All rows are written."""
        self._rest_path.unlink(missing_ok=True)

    def _refuse_others(self) -> None:
        first = self._file.readline(1 << 20)
        if first and not first.startswith(b'{"row": '[: len(first)]):
            self._file.close()
            raise OutputError(f"{self.path} holds something else than a batch's answers; name another file")

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} cannot be written: {error.strerror}")


class _Lines:
    """Finished rows of a file, one after the other."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        for line in self._file:
            if (row := _finished(line)) is not None:
                return row
        raise StopIteration

    def close(self) -> None:
        self._file.close()


def _finished(line: bytes) -> dict[str, Any] | None:
    """A row as it was written, if it is complete and was answered."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    answered = isinstance(row, dict) and "error" not in row and {"row", "request", "text"} <= row.keys()
    return row if answered else None


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while block := source.read(1 << 20):
        target.write(block)
