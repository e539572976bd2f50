"""Panics of libraries in Rust: tokenizers and llguidance panic where a stranger's file or text surprises them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mcv_runtime.errors import printable
from mcv_runtime.files import MakeError


@contextmanager
def no_panics(what: str, error: MakeError) -> Iterator[None]:
    """Raise `error` for a panic: pyo3 makes of one a BaseException, which passes all that handles errors."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":  # its class is made anew in every library, and exported by none
            raise
        reason = printable(" ".join(str(panic).split())[:200]) or "without a reason"
        raise error(f"{what} ended in a panic: {reason}") from None
