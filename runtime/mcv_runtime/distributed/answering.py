"""Requests of rows, answered by one process's engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from mcv_runtime.batch.answer_fields import answer_fields, error_line
from mcv_runtime.batch.rows import fetched
from mcv_runtime.engine import Engine
from mcv_runtime.request.request import Request


def answered(engine: Engine, requests: Sequence[Request | str], ahead: int) -> list[dict[str, Any] | str]:
    """The fields of each answer, or why there is none, which may be known; `ahead` have their pictures decoded at a time."""
    found: list[dict[str, Any] | str] = [""] * len(requests)
    asked = deque[tuple[int, Request]]()

    def taken() -> Iterator[Request]:
        for place, request in enumerate(requests):
            if isinstance(request, str):
                found[place] = request
                continue
            try:
                whole = fetched(request)
            except Exception as error:  # whatever it is, the other rows are not to blame
                found[place] = error_line(error)
            else:
                asked.append((place, request))
                yield whole

    for ticket in engine.submit_all(taken(), ahead=ahead):
        place, request = asked.popleft()
        try:
            found[place] = answer_fields(ticket.result(), regions=bool(request.options.grounding))
        except Exception as error:
            found[place] = error_line(error)
    return found
