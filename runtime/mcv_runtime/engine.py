"""The engine: a bundle, opened, that answers questions about pictures."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from mcv_runtime.bundle import folder as bundles
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.choosing.constraints import Grammars
from mcv_runtime.conversation.chat import Chat
from mcv_runtime.conversation.chat_file import read_chat
from mcv_runtime.decoding.answering import Answerer, finished
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.prefixes import PrefixCache
from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.images import MAX_PIXELS, ImageSource
from mcv_runtime.pictures.picture import Clip, Picture
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.answer import Answer
from mcv_runtime.request.option_types import check_types
from mcv_runtime.request.options import Options
from mcv_runtime.request.preparation import Messages, PictureSource, Preparer, question
from mcv_runtime.request.request import Request
from mcv_runtime.sessions.alternating import SessionTurns
from mcv_runtime.sessions.graphs import GraphSessions, SessionFactory, session_options
from mcv_runtime.sessions.providers import CPU, provider_session
from mcv_runtime.text.prompts import ChatTemplate, Prompt, PromptBuilder
from mcv_runtime.text.tokens import TextTokenizer
from mcv_runtime.vision.encoder import VisionEncoder
from mcv_runtime.vision.picture_cache import CACHE_DIR_MB, PICTURE_CACHE_MB, PictureCache, vision_identity
from mcv_runtime.vision.picture_store import PictureStore
from mcv_runtime.vision.slice_batches import VISION_MEMORY_MB, BatchSlices

if TYPE_CHECKING:
    import onnxruntime as ort

REUSE_MB = 512
"""Memory for what earlier requests have read."""


def load(
    bundle: str | Path | None = None,
    *,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    reuse_mb: float = REUSE_MB,
    batch_slices: BatchSlices = "auto",
    vision_memory_mb: float = VISION_MEMORY_MB,
    picture_cache_mb: float = PICTURE_CACHE_MB,
    cache_dir: str | Path | None = None,
    cache_dir_mb: float = CACHE_DIR_MB,
    low_memory: bool = False,
    kv: Literal["float", "int8"] = "float",
    provider: str = CPU,
    options: ort.SessionOptions | None = None,
    session_factory: SessionFactory | None = None,
) -> Engine:
    """Open a bundle, by default the demo model that ships with the package.

    `threads` defaults to the physical cores that this process may use, and no more than its cgroup's quota allows.
    `reuse_mb` bounds the memory for what earlier requests have read, so that a common beginning is not read twice (0: none).
    Equal slices are encoded `batch_slices` at a time (`auto`: one by one unless batches turn out faster), never more than
    about `vision_memory_mb` are enough for. Encoded pictures are kept, up to `picture_cache_mb` in memory and, with a
    `cache_dir`, up to `cache_dir_mb` there for other processes too. `low_memory` has either the vision graphs or the decoder
    open, never both; `kv` `int8` keeps keys and values in a quarter of the memory, if the bundle has a graph for it. `provider`
    is what of ONNX Runtime computes (`cpu`, `cuda`, `openvino`, ...); `options` and `session_factory` replace how its
    sessions are made. Raises `BundleError`, `BundleCorruptError` or `OptionError`.
    """
    start = time.perf_counter()
    opened = Bundle.open(bundles.DEFAULT if bundle is None else bundle)
    manifest = opened.manifest
    chosen = session_options(threads) if options is None else options
    if session_factory is not None and provider != CPU:
        raise OptionError(f"provider={provider!r} is for the session factory that was given to choose; leave one of them out")
    factory = provider_session(provider) if session_factory is None else session_factory
    if low_memory and batch_slices == "auto":
        batch_slices = 1  # a trial of batches would take memory
    sessions = (SessionTurns if low_memory else GraphSessions)(opened, chosen, factory)
    for graph in ("vision_encoder", manifest.compressor):  # now, so that a graph that cannot be used is found at once
        sessions(graph)
    store = None if cache_dir is None else PictureStore(cache_dir, int(cache_dir_mb * 1e6))
    vision = VisionEncoder(
        sessions,
        manifest,
        cache=PictureCache(int(picture_cache_mb * 1e6), store),
        identity=vision_identity(opened),
        batch_slices=batch_slices,
        memory_mb=vision_memory_mb,
        hold=lambda: sessions.held("vision_encoder"),
    )
    decoder_graph = _decoder_graph(manifest, kv)
    decoder = Decoder(sessions(decoder_graph), manifest, decoder_graph)
    return Engine(opened, vision, decoder, max_pixels=max_pixels, reuse_mb=reuse_mb, load_s=time.perf_counter() - start)


def _decoder_graph(manifest: Manifest, kv: str) -> GraphName:
    if kv not in ("float", "int8"):
        raise OptionError(f"kv={kv!r} is none of float, int8")
    if kv == "float":
        return "decoder_with_past"
    if "decoder_with_past_kv8" not in manifest.graphs:
        raise OptionError("this bundle has no graph for kv='int8'; build it with `mcv-export build --kv int8`")
    return "decoder_with_past_kv8"


class Engine:
    """Answers questions about pictures; made by `load`.

    Threads may share an engine: their requests run side by side, and what one has read or encoded serves the others.
    """

    def __init__(
        self,
        bundle: Bundle,
        vision: VisionEncoder,
        decoder: Decoder,
        *,
        max_pixels: int = MAX_PIXELS,
        reuse_mb: float = REUSE_MB,
        load_s: float = 0.0,
    ) -> None:
        self.bundle = bundle
        manifest = bundle.manifest
        tokenizer_json = bundle.read_text(manifest.text.tokenizer)
        tokenizer = TextTokenizer(tokenizer_json)
        template = ChatTemplate(bundle.read_text(manifest.text.chat_template), manifest.text.template_variables)
        prompts = PromptBuilder(tokenizer, template, manifest.text, manifest.placeholder)
        self._preparer = Preparer(manifest, prompts, max_pixels)
        self._vision = vision
        self._decoder = decoder
        self._answerer = Answerer(
            manifest,
            self._preparer,
            tokenizer,
            vision,
            decoder,
            Grammars(tokenizer_json, manifest.generation.stop_token_ids),
            PrefixCache(int(reuse_mb * 1e6)),
            load_s,
        )

    def ask(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Answer `prompt` about one picture, several, or none (`None` or `[]`)."""
        return self.ask_messages(question(images, prompt, system), **options)

    def stream(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Generator[str, None, Answer]:
        """Like `ask`, but gives out the text as it is made; joined, the pieces are `Answer.text`.

        The answer itself is the generator's return value (`answer = yield from engine.stream(...)`).
        """
        return (yield from self._answerer.answer(self._answerer.task(question(images, prompt, system), options)))

    def ask_messages(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """Answer the last of several messages."""
        return finished(self._answerer.answer(self._answerer.task(messages, options)))

    def batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer several requests together: each as `ask` would, decoded side by side, which is faster.

        Beam search, prompt lookup and several answers to one request are done one after the other.
        """
        tasks = [self._answerer.task(request.messages, request.options) for request in requests]
        alone = [
            task.settings.num_beams > 1 or task.settings.prompt_lookup or task.settings.num_return_sequences > 1
            for task in tasks
        ]
        together = iter(self._answerer.batch([task for task, single in zip(tasks, alone, strict=True) if not single]))
        return [
            finished(self._answerer.answer(task)) if single else next(together)
            for task, single in zip(tasks, alone, strict=True)
        ]

    def chat(self, *, system: str | None = None, **options: Unpack[Options]) -> Chat:
        """A conversation, every turn of which reads only what is new; `options` are those of every turn."""
        return Chat(self.bundle, self._answerer, system=system, options=options)

    def load_chat(self, path: str | Path, **options: Unpack[Options]) -> Chat:
        """A conversation as `Chat.save` left it; raises `ChatFileError` for a damaged file or one of another bundle."""
        messages, memory = read_chat(Path(path), self.bundle, self._decoder)
        return Chat(self.bundle, self._answerer, options=options, messages=messages, memory=memory)

    def forget(self) -> None:
        """Forget what earlier requests have read, and the pictures in memory; conversations keep their own."""
        self._answerer.forget()

    def encode_image(self, image: ImageSource, **options: Unpack[Options]) -> Picture:
        """Encode one picture, for any number of questions."""
        check_types(options, Options)
        (picture,) = self._vision.encode([self._preparer.slice(image, options)])
        return picture

    def encode_video(self, video: Video, **options: Unpack[Options]) -> Clip:
        """Encode one video, for any number of questions."""
        check_types(options, Options)
        clip = self._preparer.clip(video, options)
        return Clip(name=clip.name, frames=self._vision.encode(clip.frames))

    def prompt(self, messages: Messages, **options: Unpack[Options]) -> Prompt:
        """The prompt that `ask_messages` gives to the decoder; no graph is run."""
        check_types(options, Options)
        return self._preparer.prompt(self._preparer.sliced(messages, options), options)
