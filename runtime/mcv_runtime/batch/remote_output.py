"""The answers of a batch in a store, which can add nothing to a file.

They are written on this machine, as those of any batch, and go to the store every ten minutes, when the batch is stopped, and
when all are there, so that any machine goes on from there. After a kill this machine goes on from what it has itself, which
then is what counts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mcv_runtime.batch.answer_table import AnswerTable, lines_of
from mcv_runtime.batch.answers import BatchOutput
from mcv_runtime.batch.remote import Place, RemoteFile
from mcv_runtime.batch.rows import BatchRow
from mcv_runtime.bundle.checked import cache_folder
from mcv_runtime.errors import McvError, OutputError
from mcv_runtime.locks import try_lock

_EVERY_S = 600.0


class RemoteOutput:
    """Takes the answers of rows in their order, as `BatchOutput` does, and has a store hold them."""

    def __init__(self, to: RemoteFile) -> None:
        kept = cache_folder()
        if kept is None:
            raise OutputError(f"there is no folder for what is on its way to {to}; name one with $MCV_CACHE")
        self._to = to
        self._folder = kept / "batches" / hashlib.sha256(str(to).encode()).hexdigest()[:16]
        self._local = self._folder / "answers" / to.name
        self._output = local_output(self._local)
        self._finished = False
        self._sent = time.monotonic()

    @property
    def kept(self) -> int:
        """Rows that were there already."""
        return self._output.kept

    @property
    def dropped(self) -> int:
        """Earlier answers that no row asks for any more."""
        return self._output.dropped

    def __enter__(self) -> Self:
        try:
            self._local.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise OutputError(f"{self._folder} cannot be written: {error.strerror}; name another with $MCV_CACHE") from None
        try:
            if try_lock(self._lock) is False:
                raise OutputError(f"another mcv-run is writing {self._to}; wait for it, or name another file")
            if not any(path.exists() for path, _ in self._files()):
                self._download()
            self._output.__enter__()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._output.__exit__(kind, error, trace)
            self._upload()
        except McvError:
            if kind is None:  # else that is what has to be said, and what is here is not lost
                raise
        finally:
            os.close(self._lock)

    def has(self, row: BatchRow) -> bool:
        """Whether the row's answer is there at its place; rows must be asked about in order, until one is not."""
        return self._output.has(row)

    def settle(self) -> None:
        """No more rows are in place."""
        self._output.settle()

    def earlier(self, row: BatchRow) -> dict[str, Any] | None:
        """The answer to the same request from an earlier run, once."""
        return self._output.earlier(row)

    def write(self, answer: dict[str, Any]) -> None:
        """Write the next row's answer; when this returns, it outlives this process, and within minutes this machine."""
        self._output.write(answer)
        if time.monotonic() - self._sent >= _EVERY_S:
            self._sent = time.monotonic()
            with suppress(McvError):  # said at the end, if it is still so
                self._upload()

    def finish(self) -> None:
        """All rows are written."""
        self._output.finish()
        self._finished = True

    def _files(self) -> list[tuple[Path, RemoteFile]]:
        """What may be there, of a table its lines first, which count where there are any."""
        there = [(self._local, self._to)]
        if isinstance(self._output, AnswerTable):
            lines = lines_of(self._local)
            there.insert(0, (lines, self._to.parent.joined(lines.name)))
        return there

    def _download(self) -> None:
        for local, remote in self._files():
            if remote.exists():
                partial = self._folder / "download"
                remote.download(partial, OutputError)
                partial.replace(local)
                return

    def _upload(self) -> None:
        """Have the store hold what is here, and, if it is finished, nothing else."""
        files = self._files()
        for local, remote in files:
            if local.exists():
                remote.upload(local, OutputError)
                break
        if self._finished:
            if len(files) > 1:
                files[0][1].remove(OutputError)
            shutil.rmtree(self._local.parent, ignore_errors=True)


def local_output(path: Path) -> AnswerTable | BatchOutput:
    """The answers in a file of this machine, told by its name: a table, or lines."""
    return AnswerTable(path) if path.suffix.lower() == ".parquet" else BatchOutput(path)


def batch_output(place: Place) -> RemoteOutput | AnswerTable | BatchOutput:
    """The answers where a place says; raises `OptionError` or `OutputError` if they cannot be there."""
    return RemoteOutput(place) if isinstance(place, RemoteFile) else local_output(place)
