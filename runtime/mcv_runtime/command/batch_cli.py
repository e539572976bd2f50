"""`mcv-run --batch`: answer many requests, a few at a time, so that memory does not grow with their number."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from mcv_runtime.batch.answer_table import TIMINGS, AnswerTable
from mcv_runtime.batch.answers import BatchOutput
from mcv_runtime.batch.rows import BatchRow, Defaults
from mcv_runtime.batch.sources import batch_source
from mcv_runtime.command.progress_bar import ProgressBar, counted
from mcv_runtime.command.terminal import one_line
from mcv_runtime.decoding.ticket import Ticket, finish_first
from mcv_runtime.engine import Engine
from mcv_runtime.errors import McvError, OptionError
from mcv_runtime.progress import Event
from mcv_runtime.request.answer import Answer, Completion
from mcv_runtime.request.request import with_options

BATCH_SIZE = 8
_WAITING = 64
"""Rows with nothing to compute that may wait for one that has."""


def check_batch(source: Path, out: Path | None, size: int) -> Path:
    """Where the answers go; raises `OptionError` for what makes no sense, before a model is opened."""
    if out is None:
        raise OptionError("--batch needs --out, the file for the answers")
    if not source.exists():
        raise OptionError(f"{source} is not there; --batch takes a file of requests or a folder of pictures")
    if out.exists() and source.samefile(out):
        raise OptionError(f"{out} is the file with the requests; name another file for the answers")
    if size < 1:
        raise OptionError(f"batch-size must be at least 1, not {size}")
    return out


def answer_batch(
    engine: Engine, source: Path, out: Path, defaults: Defaults, size: int = BATCH_SIZE, notices: TextIO | None = None
) -> int:
    """Write an answer or an error for every row of `source` to `out`; 0, or 1 if a row failed."""
    notices = sys.stderr if notices is None else notices
    bar = ProgressBar(notices)
    found = batch_source(source, defaults)
    run = _Run(engine, bar, found.count() if notices.isatty() and not defaults.paging.each_page else 0)
    rows = found.rows()
    first = next(rows, None)  # what is wrong with the source is found before the output is touched
    with AnswerTable(out) if out.suffix.lower() == ".parquet" else BatchOutput(out) as output:
        try:
            remaining = itertools.dropwhile(output.has, itertools.chain(() if first is None else (first,), rows))
            left = next(remaining, None)
            output.settle()
            run.written = output.kept
            asked = itertools.chain(() if left is None else (left,), remaining)
            for answer in run.answers(asked, output.earlier, 2 * size):
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
    print(f"mcv-run: {run.answered:,} rows answered{kept}{failed}", file=notices)
    return 1 if run.failed else 0


class _Run:
    """Answers rows and counts them."""

    def __init__(self, engine: Engine, bar: ProgressBar, total: int) -> None:
        self.written = self.answered = self.failed = 0
        self._engine, self._bar, self._total = engine, bar, total
        self._start = time.monotonic()

    def answers(
        self, rows: Iterable[BatchRow], earlier: Callable[[BatchRow], dict[str, Any] | None], ahead: int
    ) -> Iterator[dict[str, Any]]:
        """What to write for each row, in order; `ahead` are asked at a time, and none waits that needs not."""
        waiting: deque[tuple[BatchRow, Ticket | dict[str, Any] | str]] = deque()
        for row in rows:
            known = None if row.request is None else earlier(row)
            waiting.append((row, self._asked(row) if known is None else known))
            while waiting and self._is_due(waiting, ahead):
                yield self._first(waiting)
        while waiting:
            yield self._first(waiting)

    def _is_due(self, waiting: Sequence[tuple[BatchRow, object]], ahead: int) -> bool:
        asked = sum(isinstance(one, Ticket) for _, one in waiting)
        return not isinstance(waiting[0][1], Ticket) or asked >= ahead or len(waiting) >= ahead + _WAITING

    def _asked(self, row: BatchRow) -> Ticket | str:
        if row.request is None:
            return row.error
        try:
            return self._engine.submit(with_options(row.request, progress=self._show), own_time=True)
        except Exception as error:  # whatever it is, the other rows are not to blame
            return _line(error)

    def _first(self, waiting: deque[tuple[BatchRow, Ticket | dict[str, Any] | str]]) -> dict[str, Any]:
        if isinstance(waiting[0][1], Ticket):
            finish_first([one for _, one in waiting if isinstance(one, Ticket)])
        row, found = waiting.popleft()
        self.written += 1
        if isinstance(found, dict):
            return found
        said = {"row": row.number, **row.said}
        try:
            answer = found.result() if isinstance(found, Ticket) else None
        except Exception as error:
            found, answer = _line(error), None
        if answer is None:
            self.failed += 1
            return {**said, "error": found}
        self.answered += 1
        asked = row.request is not None and bool(row.request.options.grounding)
        return {**said, **_told(answer), **regions_report(answer, asked=asked), "request": row.digest}

    def _show(self, event: Event) -> None:
        of = f" of {self._total:,}" if self._total else ""
        made = self.answered + self.failed
        speed = f", {made / (time.monotonic() - self._start):.1f} a second" if made else ""
        self._bar.show(f"rows {self.written:,}{of}{speed}; {counted(event)}", self.written, self._total)


def _told(answer: Answer) -> dict[str, Any]:
    """What is written of an answer."""
    told: dict[str, Any] = {
        "answer": answer.text,
        "stop_reason": answer.stop_reason,
        "tokens": len(answer.tokens),
        "prompt_tokens": len(answer.prompt_tokens),
        "timings": {name: round(getattr(answer.timings, name), 4) for name in TIMINGS},
    }
    told |= {name: value for name in ("score", "logprobs") if (value := getattr(answer, name)) is not None}
    if answer.alternatives:
        told["alternatives"] = [completion_report(one) for one in answer.alternatives]
    return told


def completion_report(completion: Completion) -> dict[str, Any]:
    """One of several answers, as JSON has it."""
    names = ("text", "tokens", "stop_reason", "logprobs", "score")
    return {name: getattr(completion, name) for name in names}


def regions_report(answer: Answer, *, asked: bool) -> dict[str, Any]:
    """The places that an answer names in its one picture, as JSON has them; nothing where nobody asked for places."""
    return {"regions": [asdict(region) for region in answer.regions()]} if asked and len(answer.pictures) == 1 else {}


def _line(error: Exception) -> str:
    return one_line(str(error) if isinstance(error, McvError) else f"{type(error).__name__}: {error}")
