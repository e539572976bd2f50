"""The answers of a batch on disk, one JSON object a line in the order of the rows, so that a later run can go on.

What is finished is found again by the digest of its request: a row that was edited, failed or is new is done, and the rest
is taken over. Rows that are there but not at their place wait in a second file, `NAME.rest`, until their turn comes; it is
gone when all is done. One process at a time writes to a file: it is locked as long as it is open.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mcv_runtime.batch.rows import BatchRow
from mcv_runtime.batch.whole_file import is_there, whole_file
from mcv_runtime.errors import OutputError
from mcv_runtime.locks import try_lock
from mcv_runtime.writing import sync

_WINDOW = 1000
"""Finished rows among which the next is looked for: as many may have been deleted or edited in a row, or moved ahead."""


class BatchOutput:
    """Takes the answers of rows in their order; a context, in which the file is open, and nobody else's to write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = 0
        """Rows that were there already."""
        self.dropped = 0
        """Earlier answers that no row asks for any more."""

    def __enter__(self) -> Self:
        try:
            place = Path(os.path.realpath(self.path))  # the rest lies beside the file itself, whatever link led there
            self._rest_path = place.with_name(f"{place.name}.rest")
            self._file = _opened(place)
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None
        try:
            if try_lock(self._file.fileno()) is False:
                raise OutputError(f"another mcv-run is writing {self.path}; wait for it, or name another file")
            opened = os.fstat(self._file.fileno())
            if not place.exists() or not os.path.samestat(opened, place.stat()):  # gone between the opening and the lock
                raise OutputError(f"another mcv-run has just finished with {self.path}; the same command goes on from there")
            _require_answers(self._file, self.path)
            if is_there(self._rest_path):
                with self._rest_path.open("rb") as rest:
                    _require_answers(rest, self._rest_path)
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from None
        self._end = 0
        self._rest: Iterator[dict[str, Any]] = iter(())
        self._window: deque[dict[str, Any]] = deque()
        self._passed: deque[dict[str, Any]] = deque()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except OSError as failure:  # what could not be written once is tried again here
            if kind is None:
                raise self._unwritable(failure) from None

    def close(self) -> None:
        """Let go of the file."""
        if isinstance(self._rest, _Lines):
            self._rest.close()
        self._file.close()

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
                self._put_aside(first)
            self._file.truncate(self._end)
            self._file.seek(self._end)
            if self._rest_path.exists():
                self._rest = _Lines(self._rest_path)
        except OSError as error:
            raise self._unwritable(error) from None

    def _put_aside(self, first: bytes) -> None:
        """Have the rows from here on in the second file, before those that it has, and on the disk before they go here."""
        with whole_file(self._rest_path) as aside:
            aside.write(first)
            _copy(self._file, aside)
            if self._rest_path.exists():
                with self._rest_path.open("rb") as older:
                    _copy(older, aside)

    def earlier(self, row: BatchRow) -> dict[str, Any] | None:
        """The answer to the same request from an earlier run, once."""
        while len(self._window) < _WINDOW and (line := next(self._rest, None)) is not None:
            self._window.append(line)
        found: dict[str, Any] | None
        place = next((place for place, there in enumerate(self._window) if there["request"] == row.digest), None)
        if place is not None:
            for _ in range(place):
                self._pass_over()
            found = self._window.popleft()
        else:
            if len(self._window) == _WINDOW:  # make room, or what is behind is never found
                self._pass_over()
            found = next((there for there in self._passed if there["request"] == row.digest), None)
            if found is None:
                return None
            self._passed.remove(found)
        self.kept += 1
        return {**found, "row": row.number}

    def _pass_over(self) -> None:
        """The next one is not asked for now: it may belong to a row that comes later."""
        self._passed.append(self._window.popleft())
        if len(self._passed) > _WINDOW:
            self._passed.popleft()
            self.dropped += 1

    def write(self, answer: dict[str, Any]) -> None:
        """Write the next row's answer; when this returns, it outlives this process, and `finish` has it outlive the system."""
        try:
            self._file.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error, "; the same command goes on from there") from None

    def finish(self) -> None:
        """All rows are written."""
        try:
            sync(self._file)
            self.dropped += len(self._passed) + len(self._window) + sum(1 for _ in self._rest)
            self._rest_path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError | ValueError, more: str = "") -> OutputError:
        if isinstance(error, OutputError):
            return error
        if isinstance(error, FileNotFoundError) and not self.path.parent.exists():
            return OutputError(f"{self.path} cannot be written: there is no folder {self.path.parent}; make it first")
        return OutputError(f"{self.path} cannot be written: {getattr(error, 'strerror', None) or error}{more}")


def _opened(path: Path) -> BinaryIO:
    """A file to read and write, made if it is not there, its content left as it is."""
    is_there(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(fd, "r+b")


def _require_answers(file: BinaryIO, path: Path) -> None:
    """Raise `OutputError` if a file holds something else; its first line may have been cut off anywhere."""
    first = file.readline(1 << 20)
    if first and not first.startswith(b'{"row": '[: len(first)]):
        raise OutputError(f"{path} holds something else than a batch's answers; name another file")


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
    answered = isinstance(row, dict) and "error" not in row and {"row", "request", "answer"} <= row.keys()
    return row if answered else None


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while block := source.read(1 << 20):
        target.write(block)
