"""The rows of a Parquet file, read a few at a time through pyarrow, an extra.

A column `image` holds paths, encoded bytes, or `{bytes, path}` as Hugging Face's datasets write them; the other columns have
the names of a row's fields. Columns of other names belong to the table, not to a request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mcv_runtime.batch.remote import Place, open_place
from mcv_runtime.batch.rows import FIELDS, BatchRow, Defaults, Encoded, Located, files_beside, refused, rows_of
from mcv_runtime.errors import OptionError, shown

_AT_ONCE = 16
"""Rows in memory, with the pictures that are in them."""


class TableSource:
    """A Parquet file."""

    def __init__(self, path: Place, defaults: Defaults) -> None:
        self._path, self._defaults = path, defaults
        self._others: list[str] = []

    @property
    def left_out(self) -> str:
        """Columns that are no fields of a request."""
        return ", ".join(map(shown, self._others))

    def count(self) -> int:
        with open_place(self._path) as file:
            return int(_opened(file, self._path).metadata.num_rows)

    def rows(self) -> Iterator[BatchRow]:
        """In order; raises `OptionError` for a file that is no Parquet or damaged."""
        located = files_beside(self._path.parent, self._defaults.fetch)
        with open_place(self._path) as file:
            table = _opened(file, self._path)
            import pyarrow

            names = list(table.schema_arrow.names)
            self._others = [name for name in names if name not in FIELDS]
            known = [name for name in names if name in FIELDS]
            if not known or (not {"image", "images", "video", "prompt"} & {*known}):
                raise OptionError(f"{self._path} has no column image, images, video or prompt, but {self.left_out or 'none'}")
            number = 0
            try:
                for group in range(table.num_row_groups):  # one by one, so that all before a damaged one are read
                    for batch in table.iter_batches(_AT_ONCE, [group], columns=known, use_threads=False):
                        for fields in batch.to_pylist():
                            number += 1
                            yield from self._row(number, fields, located)
            except (pyarrow.ArrowException, OSError, UnicodeError) as error:
                raise OptionError(f"{self._path} is damaged behind row {number:,}: {_first_line(error)}") from None

    def _row(self, number: int, fields: dict[str, Any], located: Located) -> Iterator[BatchRow]:
        row: dict[str, Any] = {}
        try:
            for name in sorted(fields, key="id".__ne__):  # the id first, for people who look for what was refused
                row[name] = table_field(name, fields[name])
        except OptionError as error:
            yield refused(number, str(error), row)
        else:
            yield from rows_of(number, row, located, self._defaults)


def table_field(name: str, value: Any) -> Any:
    """A value of a column as a row's field; raises `OptionError`."""
    if isinstance(value, float) and math.isnan(value):  # how pandas writes what is missing
        return None
    if name in ("image", "images"):
        return [_picture(one) for one in value] if isinstance(value, list) else _picture(value)
    if name == "id" and not isinstance(value, str | int | float | list | dict | bytes | None):  # a date, a decimal
        value = value.isoformat() if hasattr(value, "isoformat") else str(value)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise OptionError(
            f"{name} is nothing that JSON could say; make it a text, a number, or lists and objects of them"
        ) from None
    return value


def _picture(value: Any) -> Any:
    if isinstance(value, bytes):
        return Encoded(value)
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        data, path = value.get("bytes"), value.get("path")
        if data is None:
            return path
        if isinstance(data, bytes) and isinstance(path, str | None):
            return Encoded(data, path)
        raise OptionError("image is a path, bytes, or a struct of bytes and path")
    return value


def _opened(file: Any, path: Place) -> Any:
    reader = parquet()
    import pyarrow

    try:
        table = reader.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        _ = table.schema_arrow.names  # they may be no UTF-8
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise OptionError(f"{path} is no Parquet file, or damaged: {_first_line(error)}") from None
    return table


def parquet() -> Any:
    """pyarrow's module, or what to install, as an `OptionError`."""
    try:
        from pyarrow import parquet as module
    except ImportError:
        raise OptionError("Parquet needs pyarrow; install it with `pip install minicpmv-onnx[tables]`") from None
    return module


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
