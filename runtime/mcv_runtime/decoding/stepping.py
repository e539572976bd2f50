"""Read what jobs want: the next token of many rows in one run, or several tokens of one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.job import Job
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.slots import Slots
from mcv_runtime.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def step(slots: Slots, decoder: Decoder, tokens: Mapping[Row, int]) -> dict[Row, NDArray[np.float32] | Exception]:
    """Logits [vocab] behind the next token of every row; where rows cannot run together, each fails by itself."""
    found: dict[Row, NDArray[np.float32] | Exception] = {}
    alone = [row for row in tokens if row.again]
    together = [row for row in tokens if not row.again]
    try:
        try:
            groups = slots.ranges(together) if together else []
        except Exception:  # no memory to bring them side by side
            groups, alone = [], list(tokens)
        for rows in groups:
            try:
                found |= zip(rows, decoder.step(slots, rows, [tokens[row] for row in rows]), strict=True)
            except Exception as error:
                if len(rows) == 1:
                    found[rows[0]] = error
                else:
                    alone += rows
        for row in alone:
            try:
                found[row] = read_alone(slots, decoder, row, [tokens[row]])[0]
            except Exception as error:
                found[row] = error
    except BaseException:  # an interrupt, after which all is read again
        for row in [row for row, one in found.items() if not isinstance(one, Exception)]:
            slots.undo(row, 1)
        raise
    return found


def read_alone(slots: Slots, decoder: Decoder, row: Row, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Read several tokens of a row, behind those that must be read again; logits [tokens, vocab] of what follows each."""
    slots.mend(row)
    again = row.again
    if min(again, default=0) < 0:
        raise RunError("what it has seen in pictures was lost when a run failed or was interrupted; ask again")
    if not tokens and not again:
        return np.empty((0, 0), np.float32)
    if len(tokens) > 1:
        slots.checkpoint(row, passing=True)  # some of them may be taken back
    return decoder.read(slots, row, [*again, *tokens], wanted=range(len(again), len(again) + len(tokens)))


def arrange(slots: Slots, job: Job) -> None:
    """Give a job's rows the beginnings that it wants: of several that go on from one, all but the first are copies."""
    assert job.want is not None and job.prompt is not None
    parents, rows = job.want.parents, job.rows
    if list(parents) == list(range(len(rows))):
        return
    spare = [row for index, row in enumerate(rows) if index not in parents]
    arranged: list[Row] = []
    for place, parent in enumerate(parents):
        if parent not in parents[:place]:
            arranged.append(rows[parent])
        elif spare:
            row = spare.pop()
            slots.replace(row, rows[parent], len(job.prompt.ids))
            arranged.append(row)
        else:
            row = slots.fork(rows[parent], job.tokens)
            job.rows = [*job.rows, row]  # so that it is not lost if the next one fails
            arranged.append(row)
    for row in spare:
        slots.drop(row)
    job.rows, job.want = arranged, job.want._replace(parents=range(len(arranged)))  # an interrupt may lead here again
