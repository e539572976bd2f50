"""The answers of a batch as a Parquet file, through pyarrow, an extra.

Nothing can be added to a Parquet file. While a batch runs, its answers are lines in `NAME.rows`, as of a batch without a
table; when all are there, they become the table in one step, and the lines are gone. A batch that goes on from a table makes
lines of it first. Where there are lines, they are what counts.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mcv_runtime.batch.answer_fields import TIMINGS
from mcv_runtime.batch.answers import BatchOutput
from mcv_runtime.batch.rows import BatchRow
from mcv_runtime.batch.table import parquet
from mcv_runtime.batch.whole_file import is_there, whole_file
from mcv_runtime.errors import OutputError

_AT_ONCE = 1000
"""Rows of a group: as many are in memory."""
_TYPES: dict[str, type] = {
    "row": int,
    "id": str,
    "custom_id": str,
    "image": str,
    "page": int,
    "answer": str,
    "stop_reason": str,
    "tokens": int,
    "prompt_tokens": int,
    "timings": dict,
    "error": str,
    "request": str,
}
"""Of the columns; null where a row has nothing to say there."""


class AnswerTable:
    """Takes the answers of rows in their order, as `BatchOutput` does, whose lines it makes a table of."""

    def __init__(self, path: Path) -> None:
        parquet()  # said now, not after a night
        self.path = path
        place = Path(os.path.realpath(path))
        self._place = place
        self._rows = lines_of(place)
        self._lines = BatchOutput(self._rows)

    @property
    def kept(self) -> int:
        """Rows that were there already."""
        return self._lines.kept

    @property
    def dropped(self) -> int:
        """Earlier answers that no row asks for any more."""
        return self._lines.dropped

    def __enter__(self) -> Self:
        try:
            self._unpack()
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from None
        self._lines.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.__exit__(kind, error, trace)

    def has(self, row: BatchRow) -> bool:
        """Whether the row's answer is there at its place; rows must be asked about in order, until one is not."""
        return self._lines.has(row)

    def settle(self) -> None:
        """No more rows are in place."""
        self._lines.settle()

    def earlier(self, row: BatchRow) -> dict[str, Any] | None:
        """The answer to the same request from an earlier run, once."""
        return self._lines.earlier(row)

    def write(self, answer: dict[str, Any]) -> None:
        """Write the next row's answer; when this returns, it outlives this process."""
        self._lines.write(answer)

    def finish(self) -> None:
        """All rows are written: make the table."""
        self._lines.finish()
        try:
            with self._rows.open("rb") as lines, whole_file(self._place) as file:
                _write(file, map(json.loads, lines))
            if sys.platform == "win32":
                self._lines.close()
            self._rows.unlink()
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror or error}; the same command tries again"
            ) from None

    def _unpack(self) -> None:
        """Make the lines of a table that an earlier batch has made, all or none, unless there are lines."""
        if is_there(self._rows) or not is_there(self._place):
            return
        with whole_file(self._rows) as lines:
            for row in _read(self._place, self.path):
                lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def lines_of(table: Path) -> Path:
    """Where a table's answers are lines until all are there."""
    return table.with_name(f"{table.name}.rows")


def _write(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow

    schema = _schema()
    with parquet().ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist([_columns(row) for row in group], schema=schema))


def _read(place: Path, named: Path) -> Iterator[dict[str, Any]]:
    """The rows as they were written; raises `OutputError` for a file that is no such table."""
    import pyarrow

    try:
        with parquet().ParquetFile(place) as table:
            if table.schema_arrow.names != _schema().names:
                raise OutputError(f"{named} holds something else than a batch's answers; name another file")
            for batch in table.iter_batches(batch_size=_AT_ONCE, use_threads=False):
                for columns in batch.to_pylist():
                    more = json.loads(columns.pop("more") or "{}")
                    yield {**{name: value for name, value in columns.items() if value is not None}, **more}
    except OutputError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise OutputError(f"{named} is no Parquet file, or damaged ({error}); move it away, or name another file") from None


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the table has it; what has no column of its own, or is of another type there, stands in `more`."""
    columns: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, _TYPES.get(name, ())):
            columns[name] = value
        else:
            more[name] = value
            if name == "id":
                columns[name] = json.dumps(value, ensure_ascii=False)
    return {**columns, "more": json.dumps(more, ensure_ascii=False) if more else None}


def _schema() -> Any:
    import pyarrow as pa

    kinds = {int: pa.int64(), str: pa.string(), dict: pa.struct([(name, pa.float64()) for name in TIMINGS])}
    return pa.schema([*((name, kinds[kind]) for name, kind in _TYPES.items()), ("more", pa.string())])
