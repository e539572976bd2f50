"""The rows of any table, a few columns of it at a time: Ray Data's, Hugging Face's datasets', Spark's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mcv_runtime.batch.remote import fetched_folders
from mcv_runtime.batch.rows import FIELDS, Defaults, files_beside, rows_of
from mcv_runtime.batch.table import table_field
from mcv_runtime.distributed.answering import answered
from mcv_runtime.engine import Engine, load
from mcv_runtime.errors import McvError, OptionError, shown
from mcv_runtime.request.options import Options
from mcv_runtime.request.request import Request

_EMPTY: dict[str, Any] = {"answer": "", "stop_reason": "", "tokens": 0, "prompt_tokens": 0, "error": ""}
"""Of the columns that it adds, each of one type in every batch, whatever is missing."""


class ColumnAnswerer:
    """Answers the rows of a table: takes some of its rows as columns by name, and gives them with more columns.

    `image` is a path (from `folder`), encoded bytes, or `{bytes, path}`; the other columns with the names of a batch's fields
    count too: `images`, `prompt`, `system`, `id`, options. It adds `answer`, `stop_reason`, `tokens`, `prompt_tokens` and
    `error`, which is empty where there is an answer: one bad row ends nothing. Addresses in rows are refused, unless they are
    in one of the folders `fetch` of a store. It can be pickled; the bundle is opened where it is first called, with as many
    `threads` as the process got CPUs from Ray (`num_cpus`), or else as `load` has it. Other keywords are those of `load`.
    """

    def __init__(
        self,
        bundle: str | Path | None = None,
        *,
        prompt: str = "",
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
        folder: str | Path = ".",
        fetch: Sequence[str] = (),
        threads: int | None = None,
        max_rows: int = 8,
        **more: Any,
    ) -> None:
        self._bundle, self._threads, self._max_rows, self._more = bundle, threads, max_rows, more
        self._prompt, self._system, self._options = prompt, system, Options.of(None, dict(options or {}))
        self._folder, self._fetch = Path(folder), fetched_folders(fetch)
        self._opened: Engine | None = None
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """The columns, and those of the answers, all of the same length."""
        known = {name: column for name, column in columns.items() if name in FIELDS}
        if not known:
            raise OptionError(f"there is no column image, images, video or prompt, but {shown(sorted(columns))}")
        if taken := sorted(_EMPTY.keys() & columns.keys()):
            raise OptionError(f"there is a column {taken[0]} already; rename it")
        engine = self._engine()
        located = files_beside(self._folder, self._fetch)
        defaults = Defaults(
            prompt=self._prompt, system=self._system, options=self._options, model=engine.bundle.identity, fetch=self._fetch
        )

        def requests() -> Iterator[Request | str]:
            for number, values in enumerate(zip(*known.values(), strict=True), 1):
                try:
                    fields = {name: table_field(name, _plain(one)) for name, one in zip(known, values, strict=True)}
                    if fields.get("each_page"):
                        raise OptionError("a row has one answer; leave out each_page, or make a row of each page")
                    (row,) = rows_of(number, fields, located, defaults)
                except McvError as error:
                    yield str(error)
                else:
                    yield row.request or row.error

        found = answered(engine, list(requests()), 2 * self._max_rows)
        rows = [{**_EMPTY, **({"error": one} if isinstance(one, str) else one)} for one in found]
        return {**columns, **{name: [row[name] for row in rows] for name in _EMPTY}}

    def close(self) -> None:
        """Let go of the engine; the next call opens it again."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _engine(self) -> Engine:
        with self._lock:
            if self._opened is None:
                threads = assigned_cpus() if self._threads is None else self._threads
                self._opened = load(self._bundle, threads=threads, max_rows=self._max_rows, **self._more)
            return self._opened


def assigned_cpus() -> int | None:
    """How many CPUs Ray has given to this process, which is a worker of it; None: it is none, or has no whole one."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return int(context.get_assigned_resources().get("CPU", 0)) or None


def _plain(value: Any) -> Any:
    """A value of a column of numpy's or of pandas as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(one) for one in value] if isinstance(value, np.ndarray) and value.ndim == 1 else value
