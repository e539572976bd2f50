"""Where the rows of a batch come from, told by the name: a folder, a Parquet file, a tar archive, or lines of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mcv_runtime.batch.archive import SUFFIXES, ArchiveSource
from mcv_runtime.batch.folder import FolderSource
from mcv_runtime.batch.lines import LinesSource
from mcv_runtime.batch.remote import Place
from mcv_runtime.batch.rows import BatchRow, Defaults
from mcv_runtime.batch.table import TableSource


class BatchSource(Protocol):
    """Rows, one at a time and in the same order whenever they are asked for."""

    def count(self) -> int:
        """How many there are at most, those of documents' pages not counted; 0 where nobody knows."""

    def rows(self) -> Iterator[BatchRow]:
        """Raises `OptionError` if the source cannot be read."""

    @property
    def left_out(self) -> str:
        """What of the source is no row, in words; complete once the rows are through."""


def batch_source(path: Place, defaults: Defaults) -> BatchSource:
    """The source that a path names."""
    if path.is_dir():
        return FolderSource(path, defaults)
    name = path.name.lower()
    if name.endswith(".parquet"):
        return TableSource(path, defaults)
    return ArchiveSource(path, defaults) if name.endswith(SUFFIXES) else LinesSource(path, defaults)
