"""The three standard streams of a command, whichever of them is closed, full, or has lost its other end."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, NoReturn, TextIO

from mcv_runtime.errors import OutputError


def secure_streams() -> None:
    """Make stdin, stdout and stderr usable in this process: it must be the command's own.

    A closed one is empty, and takes everything. What cannot be written to stdout is an `OutputError`, or a `BrokenPipeError` if
    nobody reads it any more; what cannot be written to stderr is nobody's loss. Characters that a stream lacks become "?".
    """
    for number in range(3):
        _occupy(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not is_closed(sys.stdout):
        sys.stdout = _unbuffered(sys.stdout, _Answers, "replace")
    if not is_closed(sys.stderr):
        sys.stderr = _unbuffered(sys.stderr, _Notices, "backslashreplace")


def is_closed(stream: TextIO) -> bool:
    """Whether a stream was closed when the command began: then nobody wants what is written there."""
    return getattr(stream, "name", None) == os.devnull


def columns(stream: TextIO) -> int:
    """How wide a terminal is."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # no such thing as a size there
        return 80


def _occupy(number: int) -> None:
    """Have something at a stream's number: the next file that is opened would get it, and with it what a library prints."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free


def _unbuffered(stream: Any, kind: type[_Stream], errors: str) -> TextIO:
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a host's own stream
        return stream  # type: ignore[no-any-return]
    stream.flush()
    raw: Any = kind(getattr(buffer, "raw", buffer))
    return io.TextIOWrapper(raw, stream.encoding, errors, write_through=True)


class _Stream(io.RawIOBase):
    """Writes all of what it is given at once: nothing is left for the end of the interpreter, which could only fail again."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = self._raw.write(rest)
                if written is None:  # whoever shares the pipe has made it one that does not wait
                    select.select([], [self._raw], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            self._failed(error)
        return size

    def _failed(self, error: OSError) -> None:
        raise NotImplementedError

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def fileno(self) -> int:
        return int(self._raw.fileno())


class _Answers(_Stream):
    def _failed(self, error: OSError) -> NoReturn:
        if isinstance(error, BrokenPipeError):
            raise error
        raise OutputError(f"stdout cannot be written: {error.strerror}") from None


class _Notices(_Stream):
    def _failed(self, error: OSError) -> None:
        pass
