"""From a request to a ticket: what can be wrong with it is found here, in the thread that asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mcv_runtime.bundle.manifest import Manifest
from mcv_runtime.choosing.constraints import Constraint, Grammars
from mcv_runtime.choosing.prompt_lookup import PromptLookup
from mcv_runtime.choosing.sampling import Sampler
from mcv_runtime.decoding.completing import PartialCompletion
from mcv_runtime.decoding.job import Job
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.scheduler import Scheduler
from mcv_runtime.decoding.steps import Steps, decoded, guessed, searched
from mcv_runtime.decoding.ticket import Ticket
from mcv_runtime.errors import OptionError, RunError
from mcv_runtime.pictures.picture import Picture, SlicedPicture
from mcv_runtime.request.answer import Answer, Timings
from mcv_runtime.request.options import Options, Settings
from mcv_runtime.request.patience import Interrupted, Patience
from mcv_runtime.request.preparation import Messages, Part, Preparer, shown
from mcv_runtime.request.request import Request
from mcv_runtime.text.grounding import mark_ids
from mcv_runtime.text.prompts import Message
from mcv_runtime.text.tokens import TextTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Submitted:
    """A request that the scheduler has taken."""

    job: Job
    ticket: Ticket
    messages: Sequence[Message[Part]]
    """Its messages, the pictures cut."""


class Answerer:
    """Makes requests into jobs; threads may share it."""

    def __init__(
        self,
        manifest: Manifest,
        preparer: Preparer,
        tokenizer: TextTokenizer,
        grammars: Grammars,
        scheduler: Scheduler,
        *,
        graphs: str,
        chunk: int,
        load_s: float,
    ) -> None:
        """`graphs`: what tells the vision graphs from others, as `Picture.graphs`; `chunk`: most tokens to read at once."""
        self.scheduler = scheduler
        self._manifest, self._preparer, self._tokenizer, self._grammars = manifest, preparer, tokenizer, grammars
        self._graphs, self._chunk, self._load_s = graphs, chunk, load_s

    def submit(
        self,
        messages: Messages,
        options: Options,
        *,
        own_time: bool = False,
        own: Row | None = None,
        owner: Any = None,
    ) -> Submitted:
        """Cut the pictures, write the prompt and hand the request in; raises what is wrong with it.

        `own_time`: its timeout counts only while it is worked for. `own` is the row that its conversation `owner` goes on from.
        """
        settings = Settings.of(options, self._manifest.generation)
        start = time.perf_counter()
        patience = Patience(settings.timeout, options.cancel, own_time=own_time)
        try:
            sliced, prompt = self._preparer.prepare(messages, options, patience.check)
            pictures = shown(sliced)
            self._check_bundle(pictures)
            limit = min(settings.max_new_tokens, self._preparer.room(prompt))
            stops = self._preparer.stops(prompt, sliced, options, patience.check)
            lookup = PromptLookup(prompt.ids.tolist()) if settings.prompt_lookup else None
            steps = self._steps(settings, limit, lookup)
            patience.check()
        except Interrupted as interruption:
            return self.ended(interruption)
        job = Job(
            pictures=pictures,
            patience=patience,
            prompt=prompt,
            steps=steps,
            rows_needed=max(settings.num_beams, settings.num_return_sequences),
            tokens=len(prompt.ids) + limit,
            lookup=lookup,
            stops=stops,
            chunk=settings.prefill_chunk or self._chunk,
            own=own,
            owner=owner,
            progress=options.progress,
            timings=Timings(load=self._load_s, preprocess=time.perf_counter() - start),
        )
        patience.hold()
        self.scheduler.submit(job)
        return Submitted(job, Ticket(self.scheduler, job), sliced)

    def take(self, request: Request, *, own_time: bool = False) -> Ticket:
        """The ticket of a request, which `submit` has taken."""
        if not isinstance(request, Request):
            raise OptionError(f"a request is a Request(...), not {type(request).__name__}")
        return self.submit(request.conversation, request.options, own_time=own_time).ticket

    def take_or_refuse(self, request: Request) -> Ticket:
        """Like `take` for one of many, but what is wrong with the request is raised by its ticket's `result`."""
        try:
            return self.take(request, own_time=True)
        except Exception as error:
            return Ticket(self.scheduler, Job(pictures=(), patience=Patience(None, None), error=error, done=True))

    def encode(self, pictures: Sequence[SlicedPicture | Picture]) -> tuple[Picture, ...]:
        """Pictures alone, without a question."""
        self._check_bundle(pictures)
        job = Job(pictures=pictures, patience=Patience(None, None))
        self.scheduler.submit(job)
        try:
            self.scheduler.work.wait(lambda: job.done)
        finally:
            job.abandoned = True
        if job.error is not None:
            raise job.error
        if job.encoded is None:
            raise RunError("the pictures were not encoded")
        return job.encoded

    def ended(self, interruption: Interrupted) -> Submitted:
        """A request whose time was up before it began."""
        answer = Answer(text="", tokens=(), stop_reason=interruption.reason, prompt_tokens=(), pictures=(), timings=Timings())
        job = Job(pictures=(), patience=Patience(None, None), answer=answer, done=True)
        return Submitted(job, Ticket(self.scheduler, job), ())

    def _check_bundle(self, pictures: Sequence[SlicedPicture | Picture]) -> None:
        if any(isinstance(picture, Picture) and picture.graphs != self._graphs for picture in pictures):
            raise OptionError("a picture was encoded with another bundle; encode it again")

    def _steps(self, settings: Settings, limit: int, lookup: PromptLookup | None) -> Callable[[Callable[[str], None]], Steps]:
        """The way to decode that the settings ask for; compiles the constraint, so that what is wrong with it is found now."""
        constraint = self._constraint(settings)
        new = partial(self._completion, settings, limit)
        if settings.num_beams > 1:
            return lambda emit: searched(new, emit, settings, limit, constraint)
        first = new(constraint=constraint)
        if lookup is not None:
            return lambda emit: guessed(first, emit, lookup, limit)
        others = [new(index, self._constraint(settings)) for index in range(1, settings.num_return_sequences)]
        return lambda emit: decoded([first, *others], emit)

    def _completion(
        self, settings: Settings, limit: int, index: int = 0, constraint: Constraint | None = None
    ) -> PartialCompletion:
        sampling = settings.sampling
        if index and sampling.seed is not None:  # each of several answers draws for itself
            sampling = replace(sampling, seed=int(np.random.SeedSequence((sampling.seed, index)).generate_state(1)[0]))
        return PartialCompletion(
            settings,
            self._tokenizer,
            hidden=self._hidden(settings),
            limit=limit,
            sampler=Sampler(sampling),
            constraint=constraint,
        )

    def _hidden(self, settings: Settings) -> frozenset[int]:
        """What never becomes text. The end of a form is no part of it, whatever the family does with other ends."""
        ends_show = self._manifest.text.stop_token == "decoded" and settings.guide is None
        return self._dropped(settings) | (frozenset() if ends_show else settings.stop_ids)

    def _dropped(self, settings: Settings) -> frozenset[int]:
        """Ids that the family removes from an answer; who asks for places sees their marks."""
        dropped = frozenset(self._manifest.text.dropped_ids)
        return dropped - mark_ids(self._tokenizer) if settings.grounding else dropped

    def _constraint(self, settings: Settings) -> Constraint | None:
        return None if settings.guide is None else self._grammars.constraint(*settings.guide)
