"""The engine: a bundle, opened, that answers questions about pictures."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np

from mcv_runtime.bundle import folder as bundles
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.choosing.constraints import Grammars
from mcv_runtime.conversation.chat import Chat
from mcv_runtime.conversation.chat_file import read_chat
from mcv_runtime.conversation.state_file import read_state, write_state
from mcv_runtime.decoding.answering import Answerer
from mcv_runtime.decoding.arena import DeviceArena, HostArena
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.scheduler import Scheduler
from mcv_runtime.decoding.ticket import Ticket, finish_first
from mcv_runtime.documents.document import Page
from mcv_runtime.errors import OptionError
from mcv_runtime.facts import EngineInfo, MemoryUse
from mcv_runtime.pictures.images import MAX_PIXELS, ImageSource
from mcv_runtime.pictures.picture import Clip, Picture
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.answer import Answer
from mcv_runtime.request.option_types import check_type
from mcv_runtime.request.options import PREFILL_CHUNK, Keywords, Options, PictureKeywords, PictureOptions
from mcv_runtime.request.preparation import Messages, PictureSource, Preparer
from mcv_runtime.request.request import Request
from mcv_runtime.sessions.alternating import AlternatingSessions
from mcv_runtime.sessions.graphs import GraphSessions, SessionFactory
from mcv_runtime.sessions.graphs import session_options as default_session_options
from mcv_runtime.sessions.machine import check_machine
from mcv_runtime.sessions.memory import machine_memory
from mcv_runtime.sessions.profile import Profile, find_profile
from mcv_runtime.sessions.providers import CPU, device_of, provider_session, tower_session
from mcv_runtime.text.prompts import Prompt, PromptBuilder
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer
from mcv_runtime.vision.encoder import VisionEncoder
from mcv_runtime.vision.picture_cache import CACHE_DIR_MB, PictureCache, vision_identity
from mcv_runtime.vision.picture_store import PictureStore
from mcv_runtime.vision.slice_batches import BatchSlices

if TYPE_CHECKING:
    import onnxruntime as ort

MAX_ROWS = 16
"""Rows that are decoded together: more made little more of two cores (12, 26 and 34 tokens a second at 1, 4 and 16)."""
_LEAST_MEMORY = 2 << 30
_PICTURES, _SLICES, _KEPT = 1 / 8, 1 / 4, 1 / 4
"""Shares of `memory_mb`: encoded pictures, a batch of slices, beginnings of earlier requests."""


def load(
    bundle: str | Path | None = None,
    *,
    threads: int | None = None,
    memory_mb: float | None = None,
    max_rows: int = MAX_ROWS,
    max_pixels: int = MAX_PIXELS,
    reuse: bool = True,
    batch_slices: BatchSlices = "auto",
    cache_dir: str | Path | None = None,
    cache_dir_mb: float = CACHE_DIR_MB,
    low_memory: bool = False,
    open_vision: bool = True,
    kv: Literal["float", "int8"] | None = None,
    provider: str = CPU,
    tuned: bool = True,
    session_options: ort.SessionOptions | None = None,
    session_factory: SessionFactory | None = None,
) -> Engine:
    """Open a bundle, by default the demo model that ships with the package.

    `threads` defaults to the physical cores that this process may use, and no more than its cgroup's quota allows.
    `memory_mb` bounds what is held besides the weights (default: a quarter of the memory that this process may use, at least
    2,147): keys and values of requests that run, up to `max_rows` side by side, and of earlier ones, so that a common
    beginning is not read twice; encoded pictures; and a batch of slices. `reuse=False` keeps nothing of earlier requests.
    Equal slices are encoded `batch_slices` at a time (`auto`: one by one unless batches turn out faster). With a `cache_dir`,
    encoded pictures are kept there too, up to `cache_dir_mb`, for other processes. `low_memory` has either the vision graphs
    or the decoder open, never both; with `open_vision=False` the former are opened when the first picture comes, and not now.
    `kv` `int8` keeps keys and values in a quarter of the memory, if the bundle has a graph for it. What of `threads`,
    `batch_slices` and `kv` is left out, and in which pieces a prompt is read, is as `mcv-run tune` found it fastest here,
    unless `tuned` is false or the next three say something. `provider` is what of ONNX Runtime computes (`cpu`, `cuda`, ...),
    or `openvino` or `openvino-bf16`, which are for pictures only; `session_options` and `session_factory`
    replace how its sessions are made. Raises `BundleError`, `BundleCorruptError`, `MachineError` or `OptionError`.
    """
    start = time.perf_counter()
    for name, value, kind in (
        ("bundle", bundle, str | os.PathLike | None),
        ("threads", threads, int | None),
        ("memory_mb", memory_mb, float | None),
        ("max_rows", max_rows, int),
        ("max_pixels", max_pixels, int),
        ("reuse", reuse, bool),
        ("batch_slices", batch_slices, BatchSlices),
        ("cache_dir", cache_dir, str | os.PathLike | None),
        ("cache_dir_mb", cache_dir_mb, float),
        ("low_memory", low_memory, bool),
        ("open_vision", open_vision, bool),
        ("kv", kv, Literal["float", "int8"] | None),
        ("provider", provider, str),
        ("tuned", tuned, bool),
        ("session_factory", session_factory, Callable[..., Any] | None),
    ):
        check_type(name, value, kind)
    opened = Bundle.open(bundles.DEFAULT if bundle is None else bundle)
    manifest = opened.manifest
    if session_options is not None and threads is not None:
        raise OptionError("threads and session_options exclude each other; set intra_op_num_threads of the options")
    if low_memory and batch_slices == "auto":
        batch_slices = 1  # a trial of batches would take memory
    own_sessions = session_options is not None or session_factory is not None or provider != CPU
    profile = find_profile(opened) if tuned and not own_sessions else None
    if profile is not None:
        threads = profile.threads if threads is None else threads
        batch_slices = profile.batch_slices if batch_slices == "auto" else batch_slices
        kv = profile.kv if kv is None else kv
    kv = "float" if kv is None else kv
    chosen = default_session_options(threads) if session_options is None else session_options
    if not hasattr(chosen, "intra_op_num_threads"):
        raise OptionError(f"session_options must be an onnxruntime.SessionOptions, not {type(session_options).__name__}")
    if session_factory is not None and provider != CPU:
        raise OptionError(f"provider={provider!r} is for the session factory that was given to choose; leave one of them out")
    factory, towers = session_factory or provider_session(provider), session_factory or tower_session(provider)
    memory = _memory(memory_mb)
    check_machine(manifest.needs)
    decoder_graph = _decoder_graph(manifest, kv)
    sessions = (AlternatingSessions if low_memory else GraphSessions)(opened, chosen, factory, towers)
    if not low_memory:  # now, so that a graph that cannot be used is found at once
        for graph in (*(("vision_encoder", manifest.compressor) if open_vision else ()), decoder_graph):
            sessions(graph)
    store = None if cache_dir is None else PictureStore(cache_dir, _bytes("cache_dir_mb", cache_dir_mb))
    vision = VisionEncoder(
        sessions,
        manifest,
        cache=PictureCache(int(memory * _PICTURES) if reuse else 0, store),
        identity=vision_identity(opened, provider),
        batch_slices=batch_slices,
        memory_bytes=int(memory * _SLICES),
    )
    decoder, device = Decoder(sessions, manifest, decoder_graph), device_of(provider)
    slots = decoder.new_slots(
        limit=int(memory * (1 - _PICTURES - _SLICES)),
        keep_limit=int(memory * _KEPT) if reuse else 0,
        arena=HostArena if device is None else partial(DeviceArena, device=device),
    )
    if isinstance(sessions, AlternatingSessions):
        sessions.before_closing = slots.unbind
    scheduler = Scheduler(vision, decoder, slots, max_rows=max_rows, sides_exclude=low_memory)
    return Engine(
        opened,
        sessions,
        vision,
        scheduler,
        max_pixels=max_pixels,
        memory=memory,
        provider=provider,
        threads=chosen.intra_op_num_threads,
        kv=kv,
        profile=profile,
        load_s=time.perf_counter() - start,
    )


class Engine:
    """Answers questions about pictures; made by `load`. A context manager, which closes it.

    Threads and coroutines may share an engine: what they ask runs side by side, and what one has read or encoded serves the
    others. Options of a request are `Options(...)` or keywords, which change these.
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: GraphSessions,
        vision: VisionEncoder,
        scheduler: Scheduler,
        *,
        max_pixels: int = MAX_PIXELS,
        memory: int = _LEAST_MEMORY,
        provider: str = CPU,
        threads: int = 0,
        kv: Literal["float", "int8"] = "float",
        profile: Profile | None = None,
        load_s: float = 0.0,
    ) -> None:
        self.bundle = bundle
        manifest = bundle.manifest
        tokenizer_json = bundle.read_text(manifest.text.tokenizer)
        tokenizer = TextTokenizer(tokenizer_json)
        template = ChatTemplate(bundle.read_text(manifest.text.chat_template), manifest.text.template_variables)
        prompts = PromptBuilder(tokenizer, template, manifest.text, manifest.placeholder)
        self._sessions, self._vision, self._scheduler = sessions, vision, scheduler
        self._preparer = Preparer(manifest, prompts, max_pixels)
        self._memory, self._provider, self._threads = memory, provider, threads
        self._kv: Literal["float", "int8"] = kv
        self._tuned = profile is not None
        self._prefill_chunk = PREFILL_CHUNK if profile is None else profile.prefill_chunk
        self._tokenizer, self._template = tokenizer, template
        self._answerer = Answerer(
            manifest,
            self._preparer,
            tokenizer,
            Grammars(tokenizer_json, manifest.generation.stop_token_ids),
            scheduler,
            graphs=vision.identity,
            chunk=self._prefill_chunk,
            load_s=load_s,
        )

    def submit(self, request: Request, *, own_time: bool = False) -> Ticket:
        """Hand a request in: its ticket gives the answer as it is made, to this or any other thread, or to a coroutine.

        Raises what is wrong with the request. Nothing is computed while nobody waits for any ticket. A `timeout` counts from
        now, or with `own_time` only while the request is worked for: for one of many, which wait for each other.
        """
        return self._answerer.take(request, own_time=own_time)

    def ask(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        options: Options | None = None,
        **changes: Unpack[Keywords],
    ) -> Answer:
        """Answer `prompt` about one picture, several, or none (`None` or `[]`)."""
        return self.stream(images, prompt, system=system, options=options, **changes).result()

    def stream(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        options: Options | None = None,
        **changes: Unpack[Keywords],
    ) -> Ticket:
        """Like `ask`, but gives out the text as it is made; joined, the pieces are `Answer.text`."""
        return self.submit(Request(images, prompt, system, Options.of(options, changes)))

    def ask_messages(self, messages: Messages, *, options: Options | None = None, **changes: Unpack[Keywords]) -> Answer:
        """Answer the last of several messages."""
        return self._answerer.submit(messages, Options.of(options, changes)).ticket.result()

    def batch(self, requests: Iterable[Request]) -> list[Answer]:
        """Answer several requests together: each as `ask` would, decoded side by side, which is faster.

        What goes wrong with one of them is raised when the others are done; `submit_all` tells each one's end.
        """
        tickets = list(self.submit_all(requests))
        return [ticket.result() for ticket in tickets]

    def submit_all(self, requests: Iterable[Request], *, ahead: int = 2 * MAX_ROWS) -> Iterator[Ticket]:
        """Hand in requests, `ahead` at a time, and give each one's ticket once it is finished, in their order.

        A request's timeout counts only while it is worked for. What is wrong with a request is raised by its ticket's `result`.
        """
        if ahead < 1:
            raise OptionError(f"ahead must be at least 1, not {ahead}")
        waiting, taken = deque[Ticket](), iter(requests)
        while True:
            waiting.extend(map(self._answerer.take_or_refuse, islice(taken, ahead - len(waiting))))
            if not waiting:
                return
            finish_first(waiting)
            yield waiting.popleft()

    def chat(self, *, system: str | None = None, options: Options | None = None, **changes: Unpack[Keywords]) -> Chat:
        """A conversation, every question of which reads only what is new; the options are those of every question."""
        return Chat(self.bundle, self._answerer, system=system, options=Options.of(options, changes))

    def load_chat(self, path: str | Path, *, options: Options | None = None, **changes: Unpack[Keywords]) -> Chat:
        """A conversation as `Chat.save` left it; raises `ChatFileError` for a damaged file or one of another bundle."""
        chosen = Options.of(options, changes)
        with self._scheduler.work.exclusive():
            messages, row = read_chat(Path(path), self.bundle, self._scheduler.slots)
            return Chat(self.bundle, self._answerer, options=chosen, messages=messages, row=row)

    def encode_image(
        self, image: ImageSource | Page, *, options: PictureOptions | None = None, **changes: Unpack[PictureKeywords]
    ) -> Picture:
        """Encode one picture, or page of a document, for any number of questions."""
        sliced = self._preparer.slice(image, PictureOptions.of(options, changes))
        (picture,) = self._answerer.encode([sliced])
        return picture

    def encode_video(self, video: Video, *, options: PictureOptions | None = None, **changes: Unpack[PictureKeywords]) -> Clip:
        """Encode one video, for any number of questions."""
        clip = self._preparer.clip(video, PictureOptions.of(options, changes))
        return Clip(name=clip.name, frames=self._answerer.encode(clip.frames))

    def prompt(self, messages: Messages, *, options: Options | None = None, **changes: Unpack[Keywords]) -> Prompt:
        """The prompt that `ask_messages` gives to the decoder; no graph is run."""
        chosen = Options.of(options, changes)
        return self._preparer.prompt(self._preparer.sliced(messages, chosen), chosen)

    def info(self) -> EngineInfo:
        """Facts about the engine: its model, its limits, its abilities."""
        manifest = self.bundle.manifest
        return EngineInfo(
            family=manifest.family,
            model=manifest.model,
            context_length=manifest.text.context_length,
            max_new_tokens=manifest.generation.max_new_tokens,
            max_slice_nums=manifest.image.max_slice_nums,
            downsample_modes=tuple(manifest.image.downsample),
            video=manifest.video is not None,
            thinking=self._template.can_think,
            tools=self._template.can_call,
            vocab_size=manifest.text.vocab_size,
            precisions={name: graph.precision for name, graph in manifest.graphs.items()},
            provider=self._provider,
            threads=self._threads,
            kv=self._kv,
            prefill_chunk=self._prefill_chunk,
            tuned=self._tuned,
        )

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Ids of a text; what looks like a control token is one."""
        return tuple(self._tokenizer.encode(text))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        if bad := [token for token in tokens if not 0 <= token < self.bundle.manifest.text.vocab_size]:
            raise OptionError(f"there is no token {bad[0]}; this model has {self.bundle.manifest.text.vocab_size:,}")
        return self._tokenizer.decode(tokens)

    def memory(self) -> MemoryUse:
        """Bytes that are held now, by kind."""
        slots = self._scheduler.slots
        kept = slots.kept_bytes
        return MemoryUse(running=slots.nbytes - kept, kept=kept, pictures=self._vision.cache.nbytes, limit=self._memory)

    def warm_up(self) -> None:
        """Run every graph once, so that the first request takes no longer than the others."""
        side = self.bundle.manifest.image.scale_resolution
        black = self._preparer.slice(np.zeros((side, side, 3), np.uint8), PictureOptions(max_slice_nums=1))
        with self._scheduler.work.exclusive():
            self._vision.warm_up(black)
        self.ask(None, "Hi", max_new_tokens=2)

    def forget(self) -> None:
        """Forget what earlier requests have read, and the pictures in memory; conversations keep their own."""
        with self._scheduler.work.exclusive():
            self._scheduler.slots.clear()
            self._vision.cache.clear()

    def save_state(self, path: str | Path) -> int:
        """Write what earlier requests have read to a file, all or nothing, and say how many they are; raises `OutputError`."""
        with self._scheduler.work.exclusive():
            return write_state(Path(path), self.bundle, self._scheduler.slots)

    def load_state(self, path: str | Path) -> int:
        """Know again what `save_state` wrote, as far as there is room; raises `ChatFileError` for a file of another bundle."""
        with self._scheduler.work.exclusive():
            return read_state(Path(path), self.bundle, self._scheduler.slots)

    def close(self) -> None:
        """End all requests with an error, and let go of sessions and memory."""
        self._scheduler.close()
        self._vision.cache.clear()
        self._sessions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _memory(memory_mb: float | None) -> int:
    if memory_mb is not None:
        return _bytes("memory_mb", memory_mb)
    return max((machine_memory() or 0) // 4, _LEAST_MEMORY)


def _bytes(name: str, megabytes: float) -> int:
    if not 0 < megabytes < 1e12:  # NaN neither
        raise OptionError(f"{name} must be a number of megabytes above 0, not {megabytes}")
    return int(megabytes * 1e6)


def _decoder_graph(manifest: Manifest, kv: str) -> GraphName:
    if kv == "float":
        return "decoder_with_past"
    if "decoder_with_past_kv8" not in manifest.graphs:
        raise OptionError("this bundle has no graph for kv='int8'; build it with `mcv-export build --kv int8`")
    return "decoder_with_past_kv8"
