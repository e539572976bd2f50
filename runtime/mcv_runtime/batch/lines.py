"""The rows of a file with one JSON object a line: ours, or requests as OpenAI's batches and vLLM's `run-batch` take them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mcv_runtime.batch.chat_bodies import chat_row
from mcv_runtime.batch.remote import Place, RemoteFile
from mcv_runtime.batch.rows import ROW_BYTES, BatchRow, Defaults, Located, files_beside, is_plain, refused, rows_of
from mcv_runtime.errors import OptionError
from mcv_runtime.files import parse_json

_OTHERS = (b"%PDF-", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"\x1f\x8b")
"""How files begin that people name instead: PDF, PNG, JPEG, GIF, Zstandard, zip, gzip. Many others have a zero early on."""
_LOOKED_AT = 4096


class LinesSource:
    """A file of lines, or what comes through a pipe."""

    left_out = ""

    def __init__(self, path: Place, defaults: Defaults) -> None:
        self._path, self._defaults = path, defaults

    def count(self) -> int:
        """How many rows there are at most; 0 where counting them would use them up."""
        if isinstance(self._path, RemoteFile) or not self._path.is_file():
            return 0
        with self._path.open("rb") as file:
            return sum(1 for line in _lines(file) if line.strip())

    def rows(self) -> Iterator[BatchRow]:
        """In order, one at a time; raises `OptionError` if the file cannot be read."""
        try:
            with self._path.open() if isinstance(self._path, RemoteFile) else self._path.open("rb") as file:
                located = files_beside(self._folder(file), self._defaults.fetch)
                for number, line in enumerate(_lines(file), 1):
                    if number == 1 and (line.startswith(_OTHERS) or b"\0" in line[:_LOOKED_AT]):
                        raise OptionError(
                            f"{self._path} holds no lines of JSON; --batch takes those (in UTF-8), a folder of pictures and "
                            "documents, or a file named .parquet or .tar; one picture or document is asked about with --image"
                        )
                    if line.strip():
                        yield from _parsed(number, line, located, self._defaults)
        except OSError as error:
            raise OptionError(f"{self._path} cannot be read: {error.strerror}") from None

    def _folder(self, file: BinaryIO) -> Place:
        """What the rows' paths begin in."""
        if isinstance(self._path, RemoteFile):
            return self._path.parent
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISCHR(mode) and not file.isatty():
            raise OptionError(f"{self._path} is a device; --batch takes a file of requests or a folder of pictures")
        return self._path.parent if is_plain(self._path, mode) else Path()  # from `|` or `<(...)`: nothing lies beside it


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than a row may be, the beginning."""
    while line := file.readline(ROW_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(ROW_BYTES + 1)


def _parsed(number: int, line: bytes, located: Located, defaults: Defaults) -> Iterator[BatchRow]:
    def unreadable(reason: str) -> OptionError:
        return OptionError(f"the row cannot be read, it is not JSON as a row has it: {reason}")

    try:
        fields = parse_json(line, "it", error=unreadable, max_bytes=ROW_BYTES)
    except OptionError as error:
        yield refused(number, str(error))
        return
    if not isinstance(fields, dict):
        yield refused(number, "the row is not a JSON object")
    elif "custom_id" in fields or "body" in fields:
        yield chat_row(number, fields, located, defaults)
    else:
        yield from rows_of(number, fields, located, defaults)
