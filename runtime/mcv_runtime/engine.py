"""The engine: a bundle, opened, that answers questions about pictures."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

import numpy as np
import onnxruntime as ort

from mcv_runtime import bundle as bundles
from mcv_runtime.answers import Answer, Stopwatch
from mcv_runtime.bundle import Bundle
from mcv_runtime.decoding import Decoder, greedy
from mcv_runtime.errors import OptionError, PromptError
from mcv_runtime.images import MAX_PIXELS, ImageSource
from mcv_runtime.manifest import SmallImageUpsize
from mcv_runtime.prompts import ChatTemplate, Message, Prompt, PromptBuilder
from mcv_runtime.sessions import GraphSessions, SessionFactory, cpu_session, session_options
from mcv_runtime.slicing import ClipGrid, SliceGrid
from mcv_runtime.tokens import AnswerText, TextTokenizer
from mcv_runtime.video import Video, moments
from mcv_runtime.vision import Clip, Picture, SlicedPicture, VisionEncoder, pack, slice_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

PictureSource: TypeAlias = "ImageSource | Picture | Video | Clip"
Part: TypeAlias = SlicedPicture | Picture | Clip
Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""`{"role": "system", "user" or "assistant", "content": text}`, or as content a list of texts (str) and pictures (not str)."""


class Options(TypedDict, total=False):
    """What one request may change; what is left out is as the bundle says."""

    max_new_tokens: int
    repetition_penalty: float
    max_slice_nums: int | None
    use_image_id: bool | None
    thinking: bool
    downsample_mode: str | None
    small_image_upsize: SmallImageUpsize | None
    max_num_frames: int | None
    stack_frames: int | None


def load(
    bundle: str | Path | None = None,
    *,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    options: ort.SessionOptions | None = None,
    session_factory: SessionFactory = cpu_session,
) -> Engine:
    """Open a bundle, by default the demo model that ships with the package.

    `threads` defaults to the physical cores that this process may use; `options` and `session_factory` replace how ONNX
    Runtime's sessions are made. Raises `BundleError` or `BundleCorruptError`.
    """
    start = time.perf_counter()
    opened = Bundle.open(bundles.DEFAULT if bundle is None else bundle)
    manifest = opened.manifest
    chosen = session_options(threads) if options is None else options
    tokenizer = TextTokenizer(opened.read_text(manifest.text.tokenizer))
    template = ChatTemplate(opened.read_text(manifest.text.chat_template), manifest.text.template_variables)
    sessions = GraphSessions(opened, chosen, session_factory)
    for graph in ("vision_encoder", manifest.compressor):  # now, so that a graph that cannot be used is found at once
        sessions(graph)
    return Engine(
        opened,
        PromptBuilder(tokenizer, template, manifest.text, manifest.placeholder),
        VisionEncoder(sessions, manifest),
        Decoder(sessions("decoder_with_past"), manifest),
        max_pixels=max_pixels,
        load_s=time.perf_counter() - start,
    )


class Engine:
    """Answers questions about pictures; made by `load`. Keeps nothing of a request, so threads may share an engine."""

    def __init__(
        self,
        bundle: Bundle,
        prompts: PromptBuilder,
        vision: VisionEncoder,
        decoder: Decoder,
        *,
        max_pixels: int = MAX_PIXELS,
        load_s: float = 0.0,
    ) -> None:
        self.bundle = bundle
        self._manifest = bundle.manifest
        self._prompts = prompts
        self._vision = vision
        self._decoder = decoder
        self._max_pixels = max_pixels
        self._load_s = load_s

    def ask(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Answer `prompt` about one picture, several, or none (`None` or `[]`)."""
        return self.ask_messages(_question(images, prompt, system), **options)

    def stream(
        self,
        images: PictureSource | Sequence[PictureSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Like `ask`, but gives out the text as it is made; joined, the pieces are `Answer.text`."""
        yield from self._generate(_question(images, prompt, system), options)

    def ask_messages(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """Answer the last of several messages."""
        generation = self._generate(messages, options)
        while True:
            try:
                next(generation)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    def encode_image(self, image: ImageSource, **options: Unpack[Options]) -> Picture:
        """Encode one picture, for any number of questions."""
        (picture,) = self._vision.encode([self._slice(image, options)])
        return picture

    def encode_video(self, video: Video, **options: Unpack[Options]) -> Clip:
        """Encode one video, for any number of questions."""
        clip = self._clip(video, options)
        return Clip(name=clip.name, frames=self._vision.encode(clip.frames))

    def prompt(self, messages: Messages, **options: Unpack[Options]) -> Prompt:
        """The prompt that `ask_messages` gives to the decoder; no graph is run."""
        return self._prompt(self._sliced(messages, options), options)

    def _generate(self, request: Messages, options: Options) -> Generator[str, None, Answer]:
        generation = self._manifest.generation
        wanted = options.get("max_new_tokens", generation.max_new_tokens)
        penalty = options.get("repetition_penalty", generation.repetition_penalty)
        if wanted < 1:
            raise OptionError(f"max_new_tokens must be at least 1, not {wanted}")
        if not penalty > 0:
            raise OptionError(f"repetition_penalty must be above 0, not {penalty}")

        watch = Stopwatch(self._load_s)
        with watch.phase("preprocess"):
            messages = self._sliced(request, options)
            prompt = self._prompt(messages, options)
            limit = min(wanted, self._room(prompt))
        with watch.phase("vision"):
            encoded = self._vision.encode([picture for message in messages for picture in _pictures(message)])
            embeds = self._embeds(encoded)
        with watch.phase("prefill"):
            cache = self._decoder.new_cache(len(prompt.ids) + limit)
            logits = self._decoder.prefill(cache, prompt.ids, embeds, prompt.visual_positions, positions=prompt.positions)

        def step(token: int) -> NDArray[np.float32]:
            with watch.phase("decode"):
                return self._decoder.step(cache, token)

        stop = frozenset(generation.stop_token_ids)
        tokens: list[int] = []
        text = AnswerText(self._prompts.tokenizer, hidden=stop.union(self._manifest.text.dropped_ids))
        for token in greedy(logits, step, stop=stop, limit=limit, repetition_penalty=penalty):
            tokens.append(token)
            if piece := text.push(token):
                yield piece
        if piece := text.finish():
            yield piece
        return Answer(
            text=text.text,
            tokens=tuple(tokens),
            prompt_tokens=tuple(prompt.ids.tolist()),
            pictures=encoded,
            timings=watch.timings,
            stop_reason="stop" if tokens[-1] in stop else "length",
        )

    def _sliced(self, messages: Messages, options: Options) -> list[Message[Part]]:
        result: list[Message[Part]] = []
        for message in messages:
            if not isinstance(message, Mapping) or not message.keys() >= {"role", "content"}:
                raise PromptError("a message is a mapping with `role` and `content`")
            content = message["content"]
            parts = content if isinstance(content, list | tuple) else [content]
            ready = (part if isinstance(part, str | Picture | Clip) else self._cut(part, options) for part in parts)
            result.append(Message(message["role"], tuple(ready)))
        return result

    def _cut(self, source: ImageSource | Video, options: Options) -> SlicedPicture | Clip:
        return self._clip(source, options) if isinstance(source, Video) else self._slice(source, options)

    def _slice(self, source: ImageSource, options: Options) -> SlicedPicture:
        return slice_picture(
            source,
            self._manifest.image,
            max_slice_nums=options.get("max_slice_nums"),
            max_pixels=self._max_pixels,
            downsample_mode=options.get("downsample_mode"),
            small_image_upsize=options.get("small_image_upsize"),
        )

    def _clip(self, video: Video, options: Options) -> Clip:
        spec = self._manifest.video
        if spec is None:
            raise OptionError("this model takes pictures, but no videos")
        limits = options.get("max_num_frames"), options.get("stack_frames")
        shown = moments(video, spec, max_num_frames=limits[0], stack_frames=limits[1], max_pixels=self._max_pixels)
        if options.get("max_slice_nums") is None:
            options = {**options, "max_slice_nums": spec.max_slice_nums}
        packs = (pack([self._slice(frame, options) for frame in moment.frames], moment.times) for moment in shown)
        return Clip(name=video.name, frames=tuple(packs))

    def _prompt(self, messages: Sequence[Message[Part]], options: Options) -> Prompt:
        grids: list[Message[SliceGrid | ClipGrid]] = [
            Message(m.role, tuple(part if isinstance(part, str) else _grid(part) for part in m.parts)) for m in messages
        ]
        return self._prompts.build(grids, use_image_id=options.get("use_image_id"), thinking=options.get("thinking", False))

    def _room(self, prompt: Prompt) -> int:
        """Tokens that fit behind the prompt."""
        context = self._manifest.text.context_length
        if len(prompt.ids) >= context:
            raise PromptError(
                f"the prompt has {len(prompt.ids):,} tokens ({len(prompt.visual_positions):,} of them visual), but the model's"
                f" context holds {context:,} with the answer; use less text, fewer pictures or a lower max_slice_nums"
            )
        return context - len(prompt.ids)

    def _embeds(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """Visual tokens of all pictures: [visual, hidden]."""
        width = self._manifest.hidden_size
        if any(picture.embeds.shape[1] != width for picture in pictures):
            raise OptionError("a picture was encoded with another bundle; encode it again")
        return np.concatenate([np.empty((0, width), np.float32), *(picture.embeds for picture in pictures)])


def _pictures(message: Message[Part]) -> Iterator[SlicedPicture | Picture]:
    for part in message.pictures:
        yield from part.frames if isinstance(part, Clip) else (part,)


def _grid(part: Part) -> SliceGrid | ClipGrid:
    return ClipGrid(tuple(frame.grid for frame in part.frames)) if isinstance(part, Clip) else part.grid


def _question(images: PictureSource | Sequence[PictureSource] | None, prompt: str, system: str | None) -> Messages:
    """The messages of one question: pictures first, then the text."""
    if images is None:
        images = []
    several = images if isinstance(images, list | tuple) else [images]
    # among a message's parts a str is text, so a picture's path becomes a Path
    pictures = [Path(image) if isinstance(image, str) else image for image in several]
    question = {"role": "user", "content": [*pictures, prompt]}
    return [question] if system is None else [{"role": "system", "content": system}, question]
