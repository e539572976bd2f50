"""Conversations: several turns, each of which reads only what is new."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Unpack

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.conversation.chat_file import write_chat
from mcv_runtime.decoding.answering import Answerer, finished
from mcv_runtime.decoding.prefixes import Memory
from mcv_runtime.request.answer import Answer
from mcv_runtime.request.options import Options
from mcv_runtime.request.preparation import Part, PictureSource, question, with_encoded
from mcv_runtime.text.prompts import Message


class Chat:
    """A conversation with a model; made by `Engine.chat`.

    A turn that fails, or is given up before its first token, leaves the conversation as it was. One turn at a time: a second
    thread waits.
    """

    def __init__(
        self,
        bundle: Bundle,
        answerer: Answerer,
        *,
        system: str | None = None,
        options: Options | None = None,
        messages: Sequence[Message[Part]] = (),
        memory: Memory | None = None,
    ) -> None:
        self._bundle, self._answerer = bundle, answerer
        self._options: Options = options or {}
        start: list[Message[Part]] = [] if system is None else [Message("system", (system,))]
        self._messages = [*start, *messages]
        self._memory = memory
        self._turn = threading.RLock()

    @property
    def messages(self) -> tuple[Message[Part], ...]:
        """What was said so far: role and parts (texts and encoded pictures)."""
        return tuple(self._messages)

    def ask(self, images: PictureSource | Sequence[PictureSource] | None, prompt: str, **options: Unpack[Options]) -> Answer:
        """The next turn: pictures that are new in it, if any, and what to ask."""
        return finished(self.stream(images, prompt, **options))

    def stream(
        self, images: PictureSource | Sequence[PictureSource] | None, prompt: str, **options: Unpack[Options]
    ) -> Generator[str, None, Answer]:
        """Like `ask`, but gives out the text as it is made; the answer is the generator's return value."""
        with self._turn:
            chosen: Options = {**self._options, **options}
            messages = [{"role": message.role, "content": message.parts} for message in self._messages]
            task = self._answerer.task([*messages, *question(images, prompt)], chosen)
            try:
                answer = yield from self._answerer.answer(task, self._memory, keep=False)
            finally:
                self._memory = task.memory or self._memory
            if answer.tokens:
                said = with_encoded(task.messages, answer.pictures)
                self._messages = [*said, Message("assistant", (answer.text,))]
            return answer

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        with self._turn:
            self._messages = [message for message in self._messages[:1] if message.role == "system"]
            self._memory = None

    def fork(self) -> Chat:
        """A second conversation that begins as this one did and then goes its own way."""
        with self._turn:
            memory = self._memory
            copied = None if memory is None else memory.copy(memory.keys.shape[1], memory.cache.capacity)
            return Chat(self._bundle, self._answerer, options={**self._options}, messages=self._messages, memory=copied)

    def save(self, path: str | Path) -> None:
        """Write the conversation and what the model remembers of it to a file, all or nothing; raises `OutputError`."""
        with self._turn:
            write_chat(Path(path), self._bundle, self._messages, self._memory)
