"""How mcv's commands end: a known error is one line on stderr and its exit code, mostly 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from mcv_runtime.errors import McvError

USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 1


def run(app: typer.Typer, name: str, *, interrupted: str = "") -> NoReturn:
    """Run a command line and exit the process."""
    finish(lambda: app(prog_name=name, standalone_mode=False), name, interrupted=interrupted)


def finish(work: Callable[[], int | None], name: str, *, interrupted: str = "") -> NoReturn:
    """Do `work` for the command `name` and exit the process; `interrupted` is what to say after Ctrl-C."""
    try:
        code = work() or 0
        if code == INTERRUPTED:  # typer returns this after Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
    except McvError as error:
        code = _complain(f"{name}: {error}", error.exit_code)
    except TyperException as error:  # a command line that makes no sense
        code = _complain(f"{name}: {error.format_message()} See {name} --help.", USAGE)
    except (KeyboardInterrupt, typer.Abort):
        code = _complain(f"{name}: {interrupted}", INTERRUPTED) if interrupted else INTERRUPTED
    except BrokenPipeError:  # whoever read our output is gone; the interpreter must not try to flush the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def _complain(line: str, code: int) -> int:
    typer.echo(" ".join(line.split()), err=True)
    return code
