"""Conversations: several questions and answers, each of which reads only what is new."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.conversation.chat_file import write_chat
from mcv_runtime.decoding.answering import Answerer
from mcv_runtime.decoding.job import Job
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.ticket import Ticket
from mcv_runtime.request.answer import Answer
from mcv_runtime.request.options import Keywords, Options
from mcv_runtime.request.patience import Interrupted, Patience
from mcv_runtime.request.preparation import Part, PictureSource, question, with_encoded
from mcv_runtime.text.prompts import Message


class Chat:
    """A conversation with a model; made by `Engine.chat`.

    A question that fails, or whose stream is closed early, leaves the conversation as it was. One question at a time: the next
    one, from whichever thread, comes after the answer to the one before is finished. What the model has read of a conversation
    stays in the engine's memory as long as there is room; after that it is read again.
    """

    def __init__(
        self,
        bundle: Bundle,
        answerer: Answerer,
        *,
        system: str | None = None,
        options: Options | None = None,
        messages: Sequence[Message[Part]] = (),
        row: Row | None = None,
    ) -> None:
        self._bundle, self._answerer, self._options = bundle, answerer, options or Options()
        start: list[Message[Part]] = [] if system is None else [Message("system", (system,))]
        self._messages = [*start, *messages]
        self._row = row
        if row is not None:
            row.owners.add(self)
        self._asked: tuple[Job, Sequence[Message[Part]]] | None = None  # not its ticket: who has that may forget it
        self._lock = threading.Lock()  # held by who notes what was answered; never while anything is computed

    @property
    def messages(self) -> tuple[Message[Part], ...]:
        """What was said so far: role and parts (texts and encoded pictures)."""
        with self._lock:
            self._settle()
            return tuple(self._messages)

    def ask(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        options: Options | None = None,
        **changes: Unpack[Keywords],
    ) -> Answer:
        """The next question: pictures that are new in it, if any, and what to ask."""
        return self.stream(images, prompt, options=options, **changes).result()

    def stream(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        options: Options | None = None,
        **changes: Unpack[Keywords],
    ) -> Ticket:
        """Like `ask`, but gives out the text as it is made."""
        chosen = Options.of(self._options, Options.of(options, changes).given())
        patience = Patience(chosen.timeout, chosen.cancel)
        while True:
            try:
                self._finish(patience)
            except Interrupted as interruption:
                return self._answerer.ended(interruption).ticket
            if (claim := self._claim()) is not None:
                try:
                    messages = [{"role": message.role, "content": message.parts} for message in self._messages]
                    asked = self._answerer.submit([*messages, *question(images, prompt)], chosen, own=self._row, owner=self)
                except BaseException:
                    self._release(claim)
                    raise
                self._release(claim, (asked.job, asked.messages))
                return asked.ticket

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        with self._at_rest():
            self._messages = [message for message in self._messages[:1] if message.role == "system"]
            self._leave_row()

    def fork(self) -> Chat:
        """A second conversation that begins as this one did and then goes its own way."""
        with self._at_rest():
            return Chat(self._bundle, self._answerer, options=self._options, messages=self._messages, row=self._row)

    def save(self, path: str | Path) -> None:
        """Write the conversation and what the model remembers of it to a file, all or nothing; raises `OutputError`."""
        with self._at_rest(), self._answerer.scheduler.work.exclusive():
            row = self._row if self._row is not None and self._row.slot is not None else None
            write_chat(Path(path), self._bundle, self._messages, self._answerer.scheduler.slots, row)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The last question answered, and no new one begun meanwhile."""
        while True:
            self._finish(Patience(None, None))
            if (claim := self._claim()) is not None:
                try:
                    yield
                finally:
                    self._release(claim)
                return

    def _claim(self) -> Job | None:
        """Stands for a question while one is prepared, or the conversation is used otherwise; None: another is under way."""
        with self._lock:
            self._settle()
            if self._asked is not None:
                return None
            claim = Job(pictures=(), patience=Patience(None, None))
            self._asked = claim, ()
            return claim

    def _release(self, claim: Job, asked: tuple[Job, Sequence[Message[Part]]] | None = None) -> None:
        """End a claim with the question that was prepared, or with none."""
        self._asked = asked
        claim.done = True

    def _finish(self, patience: Patience) -> None:
        """Work until the last question is answered; raises `Interrupted`."""
        asked = self._asked
        if asked is not None:
            job = asked[0]
            self._answerer.scheduler.work.wait(lambda: job.done, lambda: patience.ending is not None)
            if not job.done:
                patience.check()

    def _settle(self) -> None:
        """Take note of the last answer, if it is finished; the lock is held."""
        if self._asked is None or not self._asked[0].done:
            return
        (job, messages), self._asked = self._asked, None
        if job.rows:
            if self._row is not job.rows[0]:
                self._leave_row()
            self._row = job.rows[0]
        if job.answer is not None and job.answer.tokens and not job.given_up:
            self._messages = [*with_encoded(messages, job.answer.pictures), Message("assistant", (job.answer.text,))]

    def _leave_row(self) -> None:
        if self._row is not None:
            self._row.owners.discard(self)
        self._row = None
