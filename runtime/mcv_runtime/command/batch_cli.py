"""`mcv-run --batch`: answer many requests, a few at a time, so that memory does not grow with their number."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from mcv_runtime.batch.answer_fields import answer_fields, error_line
from mcv_runtime.batch.remote import Place
from mcv_runtime.batch.remote_output import batch_output
from mcv_runtime.batch.rows import BatchRow, Defaults, fetched
from mcv_runtime.batch.sources import batch_source
from mcv_runtime.command.progress_bar import ProgressBar, counted
from mcv_runtime.decoding.ticket import Ticket, finish_first
from mcv_runtime.engine import Engine
from mcv_runtime.errors import McvError, OptionError
from mcv_runtime.progress import Event
from mcv_runtime.request.request import with_options

BATCH_SIZE = 8
_WAITING = 64
"""Rows with nothing to compute that may wait for one that has."""


Asked = TypeVar("Asked")


class Answerers(Protocol[Asked]):
    """Who answers rows: an engine, or workers that have one each."""

    ahead: int
    """Rows that are asked at a time."""

    def ask(self, row: BatchRow) -> Asked:
        """Hand in a row; raises what is wrong with it."""

    def wait(self, asked: Sequence[Asked]) -> None:
        """Until the first of them is answered."""

    def fields(self, asked: Asked) -> dict[str, Any] | str:
        """Those of its answer, or why there is none, which may also be raised."""


def check_batch(source: Place, out: Place | None, size: int) -> Place:
    """Where the answers go; raises `OptionError` for what makes no sense, before a model is opened."""
    if out is None:
        raise OptionError("--batch needs --out, the file for the answers")
    if not source.exists():
        raise OptionError(f"{source} is not there; --batch takes a file of requests or a folder of pictures")
    if source == out or (isinstance(source, Path) and isinstance(out, Path) and out.exists() and source.samefile(out)):
        raise OptionError(f"{out} is the file with the requests; name another file for the answers")
    if size < 1:
        raise OptionError(f"batch-size must be at least 1, not {size}")
    return out


def answer_batch(
    engine: Engine, source: Place, out: Place, defaults: Defaults, size: int = BATCH_SIZE, notices: TextIO | None = None
) -> int:
    """Write an answer or an error for every row of `source` to `out`; 0, or 1 if a row failed."""
    return run_batch(_OneEngine(engine, 2 * size), source, out, defaults, notices)


def run_batch(answerers: Answerers[Any], source: Place, out: Place, defaults: Defaults, notices: TextIO | None = None) -> int:
    """As `answer_batch`, by whoever answers."""
    notices = sys.stderr if notices is None else notices
    bar = ProgressBar(notices)
    found = batch_source(source, defaults)
    run = _Run(answerers, bar, found.count() if notices.isatty() and not defaults.paging.each_page else 0)
    rows = found.rows()
    first = next(rows, None)  # what is wrong with the source is found before the output is touched
    if first is None and isinstance(out, Path) and out.is_file() and out.stat().st_size:
        raise OptionError(f"{source} has no rows, and {out} has answers, which are left as they are; remove them, or mend it")
    with batch_output(out) as output:
        try:
            remaining = itertools.dropwhile(output.has, itertools.chain(() if first is None else (first,), rows))
            left = next(remaining, None)
            output.settle()
            run.written = output.kept
            asked = itertools.chain(() if left is None else (left,), remaining)
            for answer in run.answers(asked, output.earlier):
                output.write(answer)
            output.finish()
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or another signal that asks to end
            bar.close()
            print(f"mcv-run: stopped after {run.written:,} rows; the same command goes on from there", file=notices)
            raise
        finally:
            bar.close()
    if found.left_out:
        print(f"mcv-run: left out of {source}: {found.left_out}", file=notices)
    failed = f', {run.failed:,} failed (see "error" in {out}; the same command tries them again)' if run.failed else ""
    kept = f", {output.kept:,} were there" if output.kept else ""
    dropped = f", {output.dropped:,} dropped, whose rows are no more" if output.dropped else ""
    print(f"mcv-run: {run.answered:,} rows answered{kept}{dropped}{failed}", file=notices)
    return 1 if run.failed else 0


class _OneEngine:
    """This process's engine, which shows how far it is."""

    def __init__(self, engine: Engine, ahead: int) -> None:
        self._engine, self.ahead = engine, ahead
        self.show: Callable[[Event], None] | None = None

    def ask(self, row: BatchRow) -> tuple[Ticket, bool]:
        assert row.request is not None
        request = with_options(fetched(row.request), progress=self.show)
        return self._engine.submit(request, own_time=True), bool(request.options.grounding)

    def wait(self, asked: Sequence[tuple[Ticket, bool]]) -> None:
        finish_first([ticket for ticket, _ in asked])

    def fields(self, asked: tuple[Ticket, bool]) -> dict[str, Any]:
        ticket, regions = asked
        return answer_fields(ticket.result(), regions=regions)


@dataclass(slots=True)
class _Waiting:
    """A row whose turn to be written has not come."""

    row: BatchRow
    asked: Any = None
    known: dict[str, Any] | None = None
    """What to write, from an earlier run."""
    error: str = ""


class _Run:
    """Has rows answered and counts them."""

    def __init__(self, answerers: Answerers[Any], bar: ProgressBar, total: int) -> None:
        self.written = self.answered = self.failed = 0
        self._answerers, self._bar, self._total = answerers, bar, total
        self._start = time.monotonic()
        if isinstance(answerers, _OneEngine):
            answerers.show = lambda event: self._show(f"; {counted(event)}")

    def answers(
        self, rows: Iterable[BatchRow], earlier: Callable[[BatchRow], dict[str, Any] | None]
    ) -> Iterator[dict[str, Any]]:
        """What to write for each row, in order; some are asked at a time, and none waits that needs not."""
        waiting = deque[_Waiting]()
        damage: McvError | None = None
        remaining = iter(rows)
        while True:
            try:
                row = next(remaining)
            except StopIteration:
                break
            except McvError as error:  # of what the rows come from: those that could be read are answered first
                damage = error
                break
            known = None if row.request is None else earlier(row)
            waiting.append(self._asked(row) if known is None else _Waiting(row, known=known))
            while waiting and self._is_due(waiting):
                yield self._first(waiting)
        while waiting:
            yield self._first(waiting)
        if damage is not None:
            raise damage

    def _is_due(self, waiting: Sequence[_Waiting]) -> bool:
        ahead = self._answerers.ahead
        asked = sum(one.asked is not None for one in waiting)
        return waiting[0].asked is None or asked >= ahead or len(waiting) >= ahead + _WAITING

    def _asked(self, row: BatchRow) -> _Waiting:
        if row.request is None:
            return _Waiting(row, error=row.error)
        try:
            return _Waiting(row, asked=self._answerers.ask(row))
        except Exception as error:  # whatever it is, the other rows are not to blame
            return _Waiting(row, error=error_line(error))

    def _first(self, waiting: deque[_Waiting]) -> dict[str, Any]:
        if waiting[0].asked is not None:
            self._answerers.wait([one.asked for one in waiting if one.asked is not None])
        first = waiting.popleft()
        self.written += 1
        if first.known is not None:
            return first.known
        try:
            found = first.error if first.asked is None else self._answerers.fields(first.asked)
        except Exception as error:
            found = error_line(error)
        said = {"row": first.row.number, **first.row.said}
        if isinstance(found, str):
            self.failed += 1
            return {**said, "error": found}
        self.answered += 1
        self._show()
        return {**said, **found, "request": first.row.digest}

    def _show(self, more: str = "") -> None:
        of = f" of {self._total:,}" if self._total else ""
        made = self.answered + self.failed
        speed = f", {made / (time.monotonic() - self._start):.1f} a second" if made else ""
        self._bar.show(f"rows {self.written:,}{of}{speed}{more}", self.written, self._total)
