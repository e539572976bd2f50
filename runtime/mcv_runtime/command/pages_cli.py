"""`mcv-run --each-page` and `--to`: one question about every page of documents, a few pages at a time."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mcv_runtime.command.cli_options import PagesAs
from mcv_runtime.command.progress_bar import ProgressBar, counted
from mcv_runtime.command.terminal import one_line
from mcv_runtime.documents.document import Document, Page
from mcv_runtime.engine import Engine
from mcv_runtime.errors import McvError
from mcv_runtime.progress import Event
from mcv_runtime.request.answer import Answer
from mcv_runtime.request.options import Options
from mcv_runtime.request.request import Request

FAILED = 1
Report: TypeAlias = Callable[[Answer], dict[str, Any]]
"""What JSON has of an answer."""
_AHEAD = 4
_HEADS = {"text": "[{}]", "markdown": "<!-- {} -->"}
"""What stands above a page's answer: in Markdown, where it is not shown."""


class PageAnswers:
    """Asks about the pages of documents, and prints what is answered, page after page."""

    def __init__(self, engine: Engine, documents: Sequence[Document], form: PagesAs, *, max_pixels: int) -> None:
        self._engine, self._documents, self._form, self._max_pixels = engine, documents, form, max_pixels
        self._bar = ProgressBar(sys.stderr)
        self._asked: deque[Page] = deque()
        self._failed = False

    def run(self, prompt: str, system: str | None, options: Options, report: Report) -> int:
        """0, or 1 if there is a page without an answer."""
        try:
            for ticket in self._engine.submit_all(self._requests(prompt, system, options), ahead=_AHEAD):
                page = self._asked.popleft()
                try:
                    answer = ticket.result()
                except McvError as error:
                    self._refuse(error, {"document": Path(page.document.name).name, "page": page.number})
                else:
                    self._bar.clear()
                    self._print(page, answer, report)
        finally:
            self._bar.close()
        return FAILED if self._failed else 0

    def _requests(self, prompt: str, system: str | None, options: Options) -> Iterator[Request]:
        for document in self._documents:
            try:
                for page in document.open(self._max_pixels):
                    self._asked.append(page)
                    yield Request(page, prompt, system, Options.of(options, {"progress": self._show}))
            except McvError as error:  # the other documents are not to blame
                self._refuse(error, {"document": Path(document.name).name})

    def _print(self, page: Page, answer: Answer, report: Report) -> None:
        name = Path(page.document.name).name
        if self._form == "json":
            print(json.dumps({"document": name, "page": page.number, **report(answer)}, ensure_ascii=False), flush=True)
            return
        head = f"page {page.number}" if len(self._documents) == 1 else f"{name}, page {page.number}"
        print(f"{_HEADS[self._form].format(head)}\n{answer.text}\n", flush=True)

    def _refuse(self, error: McvError, where: Mapping[str, Any]) -> None:
        self._failed = True
        self._bar.clear()
        if self._form == "json":
            print(json.dumps({**where, "error": one_line(str(error))}, ensure_ascii=False), flush=True)
        print(one_line(f"mcv-run: {error}"), file=sys.stderr, flush=True)

    def _show(self, event: Event) -> None:
        if self._asked:
            self._bar.show(f"{self._asked[0].name}; {counted(event)}", 0, 0)
