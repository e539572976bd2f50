"""One loop for every request: a token for each row that runs, then one long thing, and again.

A long thing is a batch of slices or a piece of a prompt, so short that those who wait for their next token hardly notice. There
is no thread of its own: whoever waits for something, and finds nobody at work, does the work for all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mcv_runtime.decoding.completing import check_logits
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.job import Job
from mcv_runtime.decoding.prompt_pace import PromptPace
from mcv_runtime.decoding.row import Row, prompt_keys
from mcv_runtime.decoding.shared_work import SharedWork
from mcv_runtime.decoding.slots import Slots
from mcv_runtime.decoding.stepping import arrange, read_alone, step
from mcv_runtime.errors import OptionError, ResourceError, RunError
from mcv_runtime.pictures.picture import SlicedPicture
from mcv_runtime.request.answer import Answer, Completion, StopReason
from mcv_runtime.vision.encoder import VisionEncoder

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Scheduler:
    """Threads may share it; between two turns every request can come, go, or be cancelled."""

    def __init__(
        self, vision: VisionEncoder, decoder: Decoder, slots: Slots, *, max_rows: int, sides_exclude: bool = False
    ) -> None:
        """`max_rows`: how many rows decode together; `sides_exclude`: tower and decoder cannot be open at the same time."""
        if max_rows < 1:
            raise OptionError(f"max_rows must be at least 1, not {max_rows}")
        self.slots = slots
        self._vision, self.decoder = vision, decoder
        self._max_rows, self._sides_exclude = max_rows, sides_exclude
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []  # the oldest first
        self.work = SharedWork(self._turn, lambda: bool(self._waiting))
        self._closed = False
        self._long_is_due = False
        self._oldest_is_due = True
        self._side: Literal["vision", "decoder"] = "vision"
        self._pace = PromptPace()
        self._slice_s = 0.0

    def submit(self, job: Job) -> None:
        """Take a request; raises `ResourceError` for one that never fits, `RunError` once closed."""
        need = job.rows_needed * self.slots.need(job.tokens) if job.prompt is not None else 0
        if need > self.slots.limit:
            raise ResourceError(
                f"{job.rows_needed * job.tokens:,} tokens of keys and values take {need / 1e6:,.0f} MB, and memory_mb leaves"
                f" {self.slots.limit / 1e6:,.0f}; raise it, or ask for fewer tokens or answers"
            )
        with self.work.changed:
            if self._closed:
                raise RunError("the engine was closed")
            self._waiting.append(job)
            self.work.changed.notify_all()

    def close(self) -> None:
        """End all requests with an error, and take no more."""
        with self.work.exclusive():
            self._closed = True
            for job in [*self._active, *self._waiting]:
                self._fail(job, RunError("the engine was closed"))
            self._waiting.clear()
            self.slots.close()

    @property
    def load(self) -> tuple[int, int, int]:
        """Requests that decode, that are encoded or read, and that wait."""
        with self.work.changed:
            decoding = sum(job.decoding for job in self._active)
            return decoding, len(self._active) - decoding, len(self._waiting)

    def _turn(self) -> bool:
        """A token for every row, or one long thing; whether there was anything to do."""
        start = time.perf_counter()
        jobs = self._work()
        seconds = time.perf_counter() - start
        for other in self._active:
            if other not in jobs:
                other.patience.pause(seconds)
        return bool(jobs)

    def _work(self) -> Sequence[Job]:
        """Those for whom it did something."""
        self._deliver()  # what an interrupt may have kept from being delivered
        for row in self.slots.rows:
            self.slots.mend(row)
        self._sweep()
        self._activate()
        running = [job for job in self._active if job.decoding]
        if running and not self._long_is_due and self._may_decode():
            self._long_is_due = True
            self._decode(running)
            return running
        self._long_is_due = False
        for job in self._candidates():
            if self._advance(job, beside=bool(running)):
                return [job]
        if running:
            self._decode(running)
        return running

    def _sweep(self) -> None:
        """End what was cancelled, given up or is late."""
        for job in list(self._active):
            if reason := job.ending():
                self._end(job, reason)
        with self.work.changed:
            over = [job for job in self._waiting if job.ending()]
            for job in over:
                self._waiting.remove(job)
        for job in over:
            if reason := job.ending():
                self._end(job, reason)

    def _activate(self) -> None:
        """Begin with those who have waited longest, as long as their rows fit beside the others."""
        with self.work.changed:
            rows = sum(job.rows_needed for job in self._active)
            while self._waiting and (not self._active or rows + self._waiting[0].rows_needed <= self._max_rows):
                job = self._waiting.popleft()
                rows += job.rows_needed
                job.patience.resume()
                self._active.append(job)
        for job in list(self._active):
            if job.encoding is None and job.encoded is None:
                job.slices_left = sum(len(one.slices) for one in job.pictures if isinstance(one, SlicedPicture))
                job.encoding = self._vision.encoding(job.pictures, job.report, self._slices_at_once)
                if job.prompt is not None:
                    self._begin_deciding(job)

    def _slices_at_once(self) -> int:
        """One while somebody waits for a token."""
        return 1 if any(job.decoding for job in self._active) else 1 << 30

    def _begin_deciding(self, job: Job) -> None:
        assert job.steps is not None
        try:
            job.deciding = job.steps(job.emit)
            job.want = next(job.deciding)
        except Exception as error:
            self._fail(job, error)

    # Decoding

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Read what every job wants, those with one token a row together, and hand out the logits."""
        together = [job for job in jobs if job.lookup is None]
        start = time.perf_counter()
        tokens: dict[Row, int] = {}
        for job in together:
            try:
                arrange(self.slots, job)
            except Exception as error:
                self._fail(job, error)
            else:
                assert job.want is not None
                tokens |= {row: wanted[0] for row, wanted in zip(job.rows, job.want.tokens, strict=True)}
        logits = step(self.slots, self.decoder, tokens)
        seconds = time.perf_counter() - start
        for job in together:
            if not job.done:
                job.took("decode", seconds)
                self._take(job, [logits[row] for row in job.rows])
        for job in jobs:
            if job.lookup is not None and not job.done:
                start = time.perf_counter()
                try:
                    assert job.want is not None
                    job.got = read_alone(self.slots, self.decoder, job.rows[0], job.want.tokens[0])
                except Exception as error:
                    self._fail(job, error)
                job.took("decode", time.perf_counter() - start)
        self._deliver()

    def _take(self, job: Job, found: Sequence[NDArray[np.float32] | Exception]) -> None:
        logits = []
        for one in found:
            if isinstance(one, Exception):
                self._fail(job, one)
                return
            logits.append(one)
        job.got = np.stack(logits)

    def _deliver(self) -> None:
        """Send logits to those who decide, and note what they want next."""
        for job in [job for job in self._active if job.got is not None]:
            got, job.got = job.got, None
            assert got is not None
            self._send(job, got)

    def _send(self, job: Job, got: NDArray[np.float32] | StopReason) -> None:
        assert job.deciding is not None
        before = len(job.pieces)
        try:
            if not isinstance(got, str):
                if got.size:
                    check_logits(got)
                job.note_token()
            job.want = job.deciding.send(got)
            if job.want.vain:
                self.slots.undo(job.rows[0], job.want.vain)
            job.sent += 1
            job.report("answer", max(job.sent, job.emitted), 0)
        except StopIteration as end:
            self._finish(job, end.value)
        except Exception as error:
            self._fail(job, error)
        except BaseException as error:
            self._fail(job, RunError(f"the answer was interrupted by {type(error).__name__}"))
            if not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):  # a library's panic
                return
            raise
        if len(job.pieces) > before:
            job.wake()

    # Long things

    def _may_decode(self) -> bool:
        """Where tower and decoder exclude each other: not before all that began are encoded."""
        return not self._sides_exclude or self._side == "decoder"

    def _candidates(self) -> list[Job]:
        """Who may get the long thing, the most urgent first: in turns the oldest, and who has the least to do."""
        jobs = [job for job in self._active if not job.decoding]
        if self._sides_exclude:
            jobs = self._on_one_side(jobs)
        if not self._oldest_is_due and len(jobs) > 1:
            jobs.sort(key=self._left)
        return jobs

    def _on_one_side(self, jobs: list[Job]) -> list[Job]:
        """Of tower and decoder, the jobs of the one that is open, until it has no more to do."""
        looking = [job for job in jobs if job.encoded is None]
        reading = [job for job in jobs if job.encoded is not None]
        busy = any(job.decoding or job.rows for job in self._active)
        if self._side == "decoder" and looking and not busy:
            self._side = "vision"
        elif self._side == "vision" and not looking:
            self._side = "decoder"
        if self._side == "vision":
            return looking
        if looking:  # nobody who came later begins before them
            reading = [job for job in reading if job.rows or self._active.index(job) < self._active.index(looking[0])]
        return reading

    def _left(self, job: Job) -> float:
        """Seconds of work before a job's first token, about."""
        read = job.rows[0].length if job.rows else 0
        tokens = 0 if job.prompt is None else len(job.prompt.ids) - read
        return job.slices_left * self._slice_s + tokens * (self._pace.token_s or 0)

    def _advance(self, job: Job, *, beside: bool) -> bool:
        """One long thing for a job; False if there is no memory for it yet, or another one makes the same picture."""
        try:
            if not (self._look(job) if job.encoded is None else self._read(job, beside=beside)):
                return False
        except Exception as error:
            self._fail(job, error)
        self._oldest_is_due = not self._oldest_is_due
        job.wake()
        return True

    def _look(self, job: Job) -> bool:
        """Encode the next batch of slices; False while another job makes the picture."""
        assert job.encoding is not None
        start = time.perf_counter()
        try:
            slices = next(job.encoding)
        except StopIteration as end:
            job.encoded, job.encoding, job.slices_left = end.value, None, 0
            slices = 0
        seconds = time.perf_counter() - start
        job.took("vision", seconds)
        if slices:
            self._slice_s = seconds / slices
            job.slices_left -= slices
        if job.encoded is not None and job.prompt is None:
            self._finish(job, None)
        return slices > 0 or job.encoded is not None

    def _read(self, job: Job, *, beside: bool) -> bool:
        """Read the next piece of a prompt; False if there is no memory for it yet."""
        assert job.prompt is not None and job.encoded is not None
        start = time.perf_counter()
        if not job.rows and not self._begin_reading(job):
            return False
        (row,) = job.rows
        row.again = []  # which is part of the prompt
        assert job.keys is not None and job.embeds is not None
        prompt, first = job.prompt, row.length
        stop = next(stop for stop in job.stops if stop > first)
        end = min(stop, first + self._pace.tokens(job.chunk, beside=beside))
        places = prompt.visual_positions
        from_, to = np.searchsorted(places, (first, end))
        logits = self.decoder.read(
            self.slots,
            row,
            prompt.ids[first:end],
            job.embeds[from_:to],
            places[from_:to] - first,
            keys=job.keys[:, first:end],
            wanted=(-1,) if end == len(prompt.ids) else (),
        )
        if end == len(prompt.ids):
            job.got = logits  # at once, so that no interrupt can lose it
        if end == stop:
            self.slots.checkpoint(row)
        seconds = time.perf_counter() - start
        self._pace.note(end - first, seconds)
        job.took("prefill", seconds)
        job.report("prompt", end, len(prompt.ids))
        if end == len(prompt.ids):
            job.embeds = job.keys = None
            self._deliver()
        return True

    def _begin_reading(self, job: Job) -> bool:
        """Find or make the row; False if there is no memory for it yet."""
        assert job.prompt is not None and job.encoded is not None
        if any(other.crowded_out for other in self._active[: self._active.index(job)]):
            return False  # else there might never be room for the other one
        if job.keys is None:
            job.keys = prompt_keys(job.prompt, job.encoded)
            job.embeds = self.decoder.visual_tokens(job.encoded)
        row = self.slots.admit(job.keys, job.tokens, job.rows_needed, job.own)
        job.crowded_out = row is None
        if row is None:
            return False
        job.rows, job.reused = [row], row.length
        return True

    # Ends

    def _end(self, job: Job, reason: StopReason) -> None:
        """End a job early: as much of the answer as there is becomes the answer."""
        if job.prompt is None:
            self._fail(job, RunError(f"encoding ended early: {reason}"))
            return
        if job.deciding is None:
            self._begin_deciding(job)
        if not job.done:
            job.got = None
            self._send(job, reason)

    def _finish(self, job: Job, completions: Sequence[Completion] | None) -> None:
        if completions is not None:
            assert job.prompt is not None
            best, *others = completions
            drafted, accepted = (0, 0) if job.lookup is None else (job.lookup.drafted, job.lookup.accepted)
            job.answer = Answer(
                text=best.text,
                tokens=best.tokens,
                stop_reason=best.stop_reason,
                logprobs=best.logprobs,
                top_logprobs=best.top_logprobs,
                score=best.score,
                prompt_tokens=tuple(job.prompt.ids.tolist()),
                pictures=job.encoded or (),
                timings=job.timings,
                reused_tokens=job.reused,
                drafted=drafted,
                accepted=accepted,
                alternatives=tuple(others),
            )
        self._close_job(job)

    def _fail(self, job: Job, error: BaseException) -> None:
        """An error of one request, and of no other."""
        if not job.done:
            job.error = error
            self._close_job(job)

    def _close_job(self, job: Job) -> None:
        if job in self._active:
            self._active.remove(job)
        for generator in (job.encoding, job.deciding):
            if generator is not None:
                generator.close()
        job.encoding, job.got, job.embeds, job.keys = None, None, None, None
        for row in job.rows[1:]:
            self.slots.drop(row)
        if job.rows:
            if job.owner is not None:
                job.rows[0].owners.add(job.owner)
            self.slots.keep(job.rows[0])
        job.owner = job.own = None
        job.given_up = job.abandoned
        job.done = True
        job.wake()
