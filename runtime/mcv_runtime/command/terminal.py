"""How mcv's commands begin and end: a known error is one line on stderr and its exit code, mostly 2, never a traceback."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from mcv_runtime.command.streams import columns, secure_streams
from mcv_runtime.errors import McvError, printable

USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 1
_NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""What ONNX Runtime, huggingface_hub and Ray ask when they are imported or started: before, a command has to set it."""
_LONGEST = 2000
"""Characters of a complaint: what it quotes may be a stranger's."""


def run(app: typer.Typer, name: str, *, interrupted: str = "") -> NoReturn:
    """Run a command line and exit the process."""
    finish(lambda: app(prog_name=name, standalone_mode=False), name, interrupted=interrupted)


def finish(work: Callable[[], int | None], name: str, *, interrupted: str = "") -> NoReturn:
    """Do `work` for the command `name` and exit the process; `interrupted` is what to say after Ctrl-C, SIGTERM or SIGHUP."""
    secure_streams()
    for variable, value in _NO_TELEMETRY.items():
        os.environ.setdefault(variable, value)
    try:
        with _ended_by_signals(), _logged_lines(name):
            code = work() or 0
        if code == INTERRUPTED:  # typer returns this after Ctrl-C
            raise KeyboardInterrupt
    except McvError as error:
        code = _complain(f"{name}: {error}", error.exit_code)
    except TyperException as error:  # a command line that makes no sense
        code = _complain(f"{name}: {error.format_message()} See {name} --help.", USAGE)
    except (KeyboardInterrupt, typer.Abort):
        code = _complain(f"{name}: {interrupted}", INTERRUPTED) if interrupted else INTERRUPTED
    except _EndedError as ended:
        code = _complain(f"{name}: {interrupted or 'ended'}", ended.code)
    except BrokenPipeError:  # whoever read our output is gone
        code = BROKEN_PIPE
    except MemoryError:
        code = _complain(f"{name}: there is not enough memory", USAGE)
    except OSError as error:  # of a file that nobody has said more about
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        code = _complain(f"{name}: {where}{error.strerror or error}", USAGE)
    sys.exit(code)


class _EndedError(SystemExit):
    """A signal asked the process to end."""

    code: int


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP unwind the stack, so that nothing is left behind; the exit code is 128 plus the signal."""

    def end(number: int, _: object) -> None:
        for each in taken:  # a second one must not cut short what the first has set off
            signal.signal(each, signal.SIG_IGN)
        raise _EndedError(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    known = (getattr(signal, name) for name in names if hasattr(signal, name))
    taken = [each for each in known if signal.getsignal(each) == signal.SIG_DFL]  # nohup ignores one, and it stays so
    for each in taken:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def _logged_lines(name: str) -> Iterator[None]:
    """Have what the libraries log for their hosts be notices of the command, a line each."""
    handler = _Lines(name)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class _Lines(logging.Handler):
    """Says warnings on stderr; on a terminal, over what a progress bar has drawn there."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.WARNING)
        self._name = name

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = one_line(f"{self._name}: {record.getMessage()}")
            if sys.stderr.isatty():
                line = f"\r{line:<{columns(sys.stderr) - 1}}"
            typer.echo(line, err=True)
        except Exception:
            self.handleError(record)


def one_line(complaint: str) -> str:
    """A complaint as it may be shown: on one line, in characters that a terminal does not obey, and not too many of them."""
    line = printable(" ".join(complaint.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _complain(line: str, code: int) -> int:
    typer.echo(one_line(line), err=True)
    return code
