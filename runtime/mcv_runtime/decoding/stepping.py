"""Read what jobs want: the next token of many rows in one run, or several tokens of one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.job import Job
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray


def step(slots: Slots, decoder: Decoder, tokens: Mapping[Row, int]) -> dict[Row, NDArray[np.float32] | Exception]:
    """Logits [vocab] behind the next token of every row; where rows cannot run together, each fails by itself."""
    found: dict[Row, NDArray[np.float32] | Exception] = {}
    try:
        try:
            groups = slots.ranges(tokens) if tokens else []
        except Exception:  # no memory to bring them side by side
            groups = [[row] for row in tokens]
        for rows in groups:
            try:
                found |= zip(rows, decoder.step(slots, rows, [tokens[row] for row in rows]), strict=True)
            except Exception as error:
                for row in rows:
                    try:
                        found[row] = error if len(rows) == 1 else decoder.step(slots, [row], [tokens[row]])[0]
                    except Exception as own:
                        found[row] = own
    except BaseException:  # an interrupt, after which all is read again
        for row in [row for row, one in found.items() if not isinstance(one, Exception)]:
            slots.undo(row, 1)
        raise
    return found


def read_alone(slots: Slots, decoder: Decoder, job: Job) -> NDArray[np.float32]:
    """Read several tokens of a job's only row; logits [tokens, vocab] of what follows each."""
    assert job.want is not None
    wanted, again = list(job.want.tokens[0]), job.again
    if not wanted and not again:
        return np.empty((0, 0), np.float32)
    places = range(len(again), len(again) + len(wanted))
    logits = decoder.read(slots, job.rows[0], [*again, *wanted], wanted=places)
    job.again = []
    return logits


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
