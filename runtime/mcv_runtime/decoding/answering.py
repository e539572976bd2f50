"""From a prepared request to its answer: encode, read what is new, decode."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.bundle.manifest import Manifest
from mcv_runtime.choosing.beams import beam_search
from mcv_runtime.choosing.constraints import Constraint, Grammars
from mcv_runtime.choosing.prompt_lookup import PromptLookup, lookup_greedy
from mcv_runtime.choosing.sampling import Sampler
from mcv_runtime.decoding.cache import KVCache
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.prefixes import Memory, PrefixCache, prompt_keys
from mcv_runtime.decoding.rows import Row, log_probability
from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.picture import Picture
from mcv_runtime.request.answer import Answer, Completion, Stopwatch
from mcv_runtime.request.options import Options, Settings
from mcv_runtime.request.patience import Interrupted, Patience
from mcv_runtime.request.preparation import Messages, Part, Preparer, shown
from mcv_runtime.text.prompts import Message, Prompt
from mcv_runtime.text.tokens import TextTokenizer
from mcv_runtime.vision.encoder import VisionEncoder

if TYPE_CHECKING:
    from numpy.typing import NDArray


def finished(generation: Generator[str, None, Answer]) -> Answer:
    """The return value of a generator of pieces."""
    while True:
        try:
            next(generation)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


@dataclass(slots=True, eq=False, kw_only=True)
class Task:
    """A request on its way: what is asked, and what is known so far."""

    options: Options
    settings: Settings
    messages: Sequence[Message[Part]]
    prompt: Prompt
    limit: int
    """Most tokens of an answer."""
    watch: Stopwatch
    patience: Patience
    pictures: tuple[Picture, ...] = ()
    memory: Memory | None = None
    reused: int = 0


class Answerer:
    """Answers prepared requests; threads may share it, a `Memory` belongs to one request at a time."""

    def __init__(
        self,
        manifest: Manifest,
        preparer: Preparer,
        tokenizer: TextTokenizer,
        vision: VisionEncoder,
        decoder: Decoder,
        grammars: Grammars,
        prefixes: PrefixCache,
        load_s: float,
    ) -> None:
        self._manifest = manifest
        self._preparer = preparer
        self._tokenizer = tokenizer
        self._vision = vision
        self._decoder = decoder
        self._grammars = grammars
        self._prefixes = prefixes
        self._load_s = load_s

    def task(self, messages: Messages, options: Options) -> Task:
        """Cut the pictures and write the prompt; raises what is wrong with the request."""
        settings = Settings.of(options, self._manifest.generation)
        watch, patience = Stopwatch(self._load_s), Patience(settings)
        with watch.phase("preprocess"):
            sliced = self._preparer.sliced(messages, options)
            prompt = self._preparer.prompt(sliced, options)
            limit = min(settings.max_new_tokens, self._preparer.room(prompt))
        return Task(
            options=options, settings=settings, messages=sliced, prompt=prompt, limit=limit, watch=watch, patience=patience
        )

    def answer(self, task: Task, memory: Memory | None = None, *, keep: bool = True) -> Generator[str, None, Answer]:
        """The answer's text piece by piece, then the answer.

        It goes on from `memory`, or else from what other requests have left; `keep`: for such requests, not for the caller.
        """
        rows: list[Row] = []
        try:
            logits = self.read(task, memory)
            rows = [self._row(task, index) for index in range(task.settings.num_return_sequences)]
            if task.settings.num_beams > 1:
                completions = self._search(task, logits)
                yield completions[0].text
                return self._answer(task, completions)
            if task.settings.prompt_lookup:
                lookup = PromptLookup(task.prompt.ids.tolist())
                yield from self._look_up(task, logits, rows[0], lookup)
                return self._answer(task, [rows[0].completion()], drafted=lookup.drafted, accepted=lookup.accepted)
            for index, piece in self._decode(task, rows, logits):
                if not index:
                    yield piece
        except Interrupted as interruption:
            rows = rows or [self._row(task, 0)]
            for index, row in enumerate(rows):
                piece = row.end(interruption.reason)
                if piece and not index:
                    yield piece
        finally:
            if keep and task.memory is not None:
                self._prefixes.keep(task.memory)
        return self._answer(task, [row.completion() for row in rows])

    def forget(self) -> None:
        """Keep nothing of what earlier requests have read or shown."""
        self._prefixes.clear()
        self._vision.cache.clear()

    def batch(self, tasks: Sequence[Task]) -> list[Answer]:
        """Greedy or sampled answers to several requests, decoded together; what each is alone."""
        if not tasks:
            return []
        rows = [self._row(task, 0) for task in tasks]
        heads: list[NDArray[np.float32]] = []
        read: list[int] = []
        for index, (task, row) in enumerate(zip(tasks, rows, strict=True)):
            try:
                heads.append(self.read(task))
                read.append(index)
            except Interrupted as interruption:
                row.end(interruption.reason)
                if task.memory is not None:
                    self._prefixes.keep(task.memory)
        if read:
            self._decode_together([tasks[index] for index in read], [rows[index] for index in read], np.stack(heads))
        return [self._answer(task, [row.completion()]) for task, row in zip(tasks, rows, strict=True)]

    def _decode_together(self, tasks: Sequence[Task], rows: Sequence[Row], logits: NDArray[np.float32]) -> None:
        memories = [task.memory for task in tasks if task.memory is not None]
        capacity = max(self._decoder.room(len(task.prompt.ids) + task.limit) for task in tasks)
        cache = KVCache.joined([(memory.cache, 0) for memory in memories], capacity)
        for memory in memories:
            self._prefixes.keep(memory)
        with tasks[0].watch.phase("decode"):
            for _ in self._rows(rows, cache, logits, [task.patience for task in tasks]):
                pass
        for task in tasks[1:]:
            task.watch.timings = replace(task.watch.timings, decode=tasks[0].watch.timings.decode)

    def read(self, task: Task, memory: Memory | None = None) -> NDArray[np.float32]:
        """Encode the pictures and read the prompt from where memory ends; logits [vocab] of what follows."""
        decoder, prompt, patience = self._decoder, task.prompt, task.patience
        patience.check()
        with task.watch.phase("vision"):
            task.pictures = self._vision.encode(shown(task.messages), progress=patience.report)
            embeds = self._embeds(task.pictures)
        with task.watch.phase("prefill"):
            keys = prompt_keys(prompt, task.pictures)
            capacity = decoder.room(len(prompt.ids) + task.limit)
            if memory is None:
                memory = self._prefixes.recall(keys, capacity, decoder)
            else:
                memory.rewind(memory.shared(keys))
                if memory.cache.capacity < capacity:
                    memory.cache = memory.cache.gathered([0], capacity)
            task.memory, task.reused = memory, memory.cache.length
            logits = np.empty(0, np.float32)
            for end in self._checkpoints(task, memory):
                if end > memory.cache.length:
                    logits = self._read_until(task, memory, keys, embeds, end)
                    memory.checkpoint()
        return logits

    def _read_until(
        self, task: Task, memory: Memory, keys: NDArray[np.int64], embeds: NDArray[np.float32], end: int
    ) -> NDArray[np.float32]:
        prompt, start, total = task.prompt, memory.cache.length, len(task.prompt.ids)
        first, last = np.searchsorted(prompt.visual_positions, (start, end))

        def note(done: int) -> None:
            memory.remember(keys[:, memory.keys.shape[1] : start + done])
            task.patience.report("prompt", start + done, total)

        return self._decoder.prefill(
            memory.cache,
            prompt.ids[start:end],
            embeds[first:last],
            prompt.visual_positions[first:last] - start,
            task.settings.prefill_chunk,
            None if prompt.positions is None else prompt.positions[:, start:end],
            note,
        )

    def _checkpoints(self, task: Task, memory: Memory) -> list[int]:
        """Where to stop while reading the prompt, its end the last: what a cache cannot rewind to is noted there.

        Another question about the same pictures goes on behind the last of them, the next turn of a conversation behind the
        messages: the beginning of the assistant's part may be written otherwise when it is history.
        """
        ids, places = task.prompt.ids, task.prompt.visual_positions
        if memory.cache.rewindable:
            return [len(ids)]
        history = self._preparer.prompt(task.messages, task.options, answering=False).ids
        limit = min(len(history), len(ids))
        differing = np.flatnonzero(history[:limit] != ids[:limit])
        stable = int(differing[0]) if len(differing) else limit
        return sorted({int(places[-1]) + 1 if len(places) else 0, stable, len(ids)})

    def _row(self, task: Task, index: int) -> Row:
        sampling = task.settings.sampling
        if index and sampling.seed is not None:  # each of several answers draws for itself
            sampling = replace(sampling, seed=int(np.random.SeedSequence((sampling.seed, index)).generate_state(1)[0]))
        return Row(
            task.settings,
            self._tokenizer,
            hidden=task.settings.stop_ids.union(self._manifest.text.dropped_ids),
            limit=task.limit,
            sampler=Sampler(sampling),
            constraint=self._constraint(task),
        )

    def _constraint(self, task: Task) -> Constraint | None:
        return None if task.settings.guide is None else self._grammars.constraint(*task.settings.guide)

    def _decode(self, task: Task, rows: list[Row], logits: NDArray[np.float32]) -> Iterator[tuple[int, str]]:
        """Several answers to one prompt, or one; of one, the memory stays up to date."""
        memory = task.memory
        assert memory is not None
        cache = memory.cache if len(rows) == 1 else memory.cache.gathered([0] * len(rows))
        stepping = self._rows(rows, cache, np.stack([logits] * len(rows)), [task.patience] * len(rows))
        while True:
            with task.watch.phase("decode"):
                step = next(stepping, None)
            if len(rows) == 1:
                self._remember_tokens(task, rows[0].tokens)
            if step is None:
                return
            yield step

    def _rows(
        self, rows: Sequence[Row], cache: KVCache, logits: NDArray[np.float32], patience: Sequence[Patience]
    ) -> Iterator[tuple[int, str]]:
        """Decode row by row of `cache` until all are done, each as long as its patience; (index, piece of text)."""
        active = list(range(len(rows)))
        while True:
            for place, index in enumerate(active):
                if piece := rows[index].choose(logits[place]):
                    yield index, piece
                try:
                    if rows[index].reason is None:
                        patience[index].report("answer", len(rows[index].tokens), 0)
                except Interrupted as interruption:
                    if piece := rows[index].end(interruption.reason):
                        yield index, piece
            going = [place for place, index in enumerate(active) if rows[index].reason is None]
            if not going:
                return
            if len(going) < len(active):
                cache, active = cache.gathered(going), [active[place] for place in going]
            logits = self._decoder.step(cache, [rows[index].tokens[-1] for index in active])

    def _remember_tokens(self, task: Task, tokens: Sequence[int]) -> None:
        """Note what the cache has read of the answer."""
        memory, start = task.memory, len(task.prompt.ids)
        assert memory is not None
        known, length = memory.keys.shape[1], memory.cache.length
        ids = np.array(tokens[known - start : length - start], np.int64)
        places = np.arange(known, length) + memory.cache.shifts[0]
        memory.remember(np.vstack([ids, *[places] * (len(memory.keys) - 1)]))

    def _search(self, task: Task, logits: NDArray[np.float32]) -> list[Completion]:
        """The best answers of a beam search, best first."""
        settings, memory, made = task.settings, task.memory, 0
        assert memory is not None
        cache = memory.cache.gathered([0] * settings.num_beams)

        def step(parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
            nonlocal made
            made += 1
            task.patience.report("answer", made, task.limit)
            cache.select(parents.tolist())
            return self._decoder.step(cache, tokens.tolist())

        with task.watch.phase("decode"):
            found = beam_search(
                logits,
                step,
                num_beams=settings.num_beams,
                stop=settings.stop_ids,
                limit=task.limit,
                length_penalty=settings.length_penalty,
                early_stopping=settings.early_stopping,
                repetition_penalty=settings.sampling.repetition_penalty,
                num_return_sequences=settings.num_return_sequences,
                constraint=self._constraint(task),
            )
            completions = []
            for index, hypothesis in enumerate(found):
                row = self._row(task, index)
                for token in hypothesis.tokens:
                    if row.reason is None:
                        row.accept(token)
                row.end("stop" if len(row.tokens) < task.limit else "length")  # a constraint ends without a stop token
                if settings.logprobs:
                    row.add_logprobs(self._score(task, logits, row.tokens))
                completions.append(row.completion(hypothesis.score))
        return completions

    def _score(self, task: Task, logits: NDArray[np.float32], tokens: Sequence[int]) -> list[float]:
        """The log-probability of each token of a finished answer; `logits` follow the prompt."""
        assert task.memory is not None
        prompt = task.memory.copy(len(task.prompt.ids), task.memory.cache.capacity)
        rows = [logits, *(self._decoder.read(prompt.cache, tokens[:-1]) if len(tokens) > 1 else ())]
        return [log_probability(row, token) for row, token in zip(rows, tokens, strict=True)]

    def _look_up(self, task: Task, logits: NDArray[np.float32], row: Row, lookup: PromptLookup) -> Iterator[str]:
        """The greedy answer with tokens guessed from the prompt and the answer so far."""
        memory, decoder = task.memory, self._decoder
        assert memory is not None
        cache, before, tail = memory.cache, memory.cache.states(), list[int]()

        def read(tokens: list[int]) -> NDArray[np.float32]:
            nonlocal before, tail
            task.patience.report("answer", len(row.tokens), task.limit)
            before, tail = cache.states(), tokens
            return decoder.read(cache, tokens)

        def rewind(count: int) -> None:
            cache.rewind(cache.length - (count if cache.rewindable else len(tail)), before)
            if not cache.rewindable:  # a state of fixed size goes back to before all of them
                decoder.read(cache, tail[: len(tail) - count])

        tokens = lookup_greedy(
            logits,
            read,
            rewind,
            lookup=lookup,
            stop=task.settings.stop_ids,
            limit=task.limit,
            repetition_penalty=task.settings.sampling.repetition_penalty,
        )
        try:
            while row.reason is None:
                with task.watch.phase("decode"):
                    token = next(tokens)
                if piece := row.accept(token):
                    yield piece
        finally:
            tokens.close()
            self._remember_tokens(task, row.tokens)
            if task.settings.logprobs and row.tokens:
                row.add_logprobs(self._score(task, logits, row.tokens))

    def _embeds(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """Visual tokens of all pictures: [visual, hidden]."""
        width = self._manifest.hidden_size
        if any(picture.embeds.shape[1] != width for picture in pictures):
            raise OptionError("a picture was encoded with another bundle; encode it again")
        return np.concatenate([np.empty((0, width), np.float32), *(picture.embeds for picture in pictures)])

    def _answer(self, task: Task, completions: Sequence[Completion], *, drafted: int = 0, accepted: int = 0) -> Answer:
        best, *others = completions
        return Answer(
            text=best.text,
            tokens=best.tokens,
            stop_reason=best.stop_reason,
            logprobs=best.logprobs,
            score=best.score,
            prompt_tokens=tuple(task.prompt.ids.tolist()),
            pictures=task.pictures,
            timings=task.watch.timings,
            reused_tokens=task.reused,
            drafted=drafted,
            accepted=accepted,
            alternatives=tuple(others),
        )
