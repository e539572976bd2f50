"""From messages with pictures and videos in them to slices and a prompt; no graph is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mcv_runtime.bundle.manifest import Manifest
from mcv_runtime.errors import OptionError, PromptError
from mcv_runtime.pictures.images import ImageSource
from mcv_runtime.pictures.picture import Clip, Picture, SlicedPicture, pack, slice_picture
from mcv_runtime.pictures.slicing import ClipGrid, SliceGrid
from mcv_runtime.pictures.video import Video, plan_video
from mcv_runtime.request.options import Options, PictureOptions
from mcv_runtime.text.prompts import Message, Prompt, PromptBuilder

PictureSource: TypeAlias = "ImageSource | Picture | Video | Clip"
Part: TypeAlias = SlicedPicture | Picture | Clip
Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""`{"role": "system", "user" or "assistant", "content": text}`, or as content a list of texts (str) and pictures (not str)."""


class Preparer:
    """Cuts a request's pictures and writes its prompt."""

    def __init__(self, manifest: Manifest, prompts: PromptBuilder, max_pixels: int) -> None:
        self._manifest, self._prompts, self._max_pixels = manifest, prompts, max_pixels

    def sliced(self, messages: Messages, options: Options, check: Callable[[], None] = lambda: None) -> list[Message[Part]]:
        """The messages, their pictures cut into slices; what `check` raises before one of them ends that."""
        result: list[Message[Part]] = []
        if not isinstance(messages, Sequence):
            raise PromptError("the messages are a list of mappings with `role` and `content`")
        for message in messages:
            if not isinstance(message, Mapping) or not message.keys() >= {"role", "content"}:
                raise PromptError("a message is a mapping with `role` and `content`")
            content = message["content"]
            parts = content if isinstance(content, list | tuple) else [content]
            ready: list[str | Part] = []
            for part in parts:
                check()
                known = isinstance(part, str | SlicedPicture | Picture | Clip)
                ready.append(part if known else self.cut(part, options, check))
            result.append(Message(message["role"], tuple(ready)))
        return result

    def cut(
        self, source: ImageSource | Video, options: PictureOptions, check: Callable[[], None] = lambda: None
    ) -> SlicedPicture | Clip:
        """One picture or video."""
        return self.clip(source, options, check) if isinstance(source, Video) else self.slice(source, options)

    def slice(self, source: ImageSource, options: PictureOptions) -> SlicedPicture:
        """One picture, cut into slices."""
        return slice_picture(
            source,
            self._manifest.image,
            max_slice_nums=options.max_slice_nums,
            max_pixels=self._max_pixels,
            downsample_mode=options.downsample_mode,
            small_image_upsize=options.small_image_upsize,
        )

    def clip(self, video: Video, options: PictureOptions, check: Callable[[], None] = lambda: None) -> Clip:
        """One video as pictures; what `check` raises between its frames ends that."""
        spec = self._manifest.video
        if spec is None:
            raise OptionError("this model takes pictures, but no videos")
        limits = options.max_num_frames, options.stack_frames
        plan = plan_video(
            video, spec, max_num_frames=limits[0], stack_frames=limits[1], max_pixels=self._max_pixels, check=check
        )
        shown = plan.moments(max_pixels=self._max_pixels, check=check)
        if options.max_slice_nums is None:
            options = replace(options, max_slice_nums=spec.max_slice_nums)
        packs = (pack([self.slice(frame, options) for frame in moment.frames], moment.times) for moment in shown)
        return Clip(name=video.name, frames=tuple(packs))

    def prompt(self, messages: Sequence[Message[Part]], options: Options, *, answering: bool = True) -> Prompt:
        """The prompt of sliced messages; `answering`: up to where the assistant begins."""
        grids: list[Message[SliceGrid | ClipGrid]] = [
            Message(m.role, tuple(part if isinstance(part, str) else _grid(part) for part in m.parts)) for m in messages
        ]
        return self._prompts.build(
            grids,
            use_image_id=options.use_image_id,
            thinking=bool(options.thinking),
            grounding=bool(options.grounding),
            answering=answering,
        )

    def stops(self, prompt: Prompt, messages: Sequence[Message[Part]], options: Options) -> list[int]:
        """Lengths of a prompt that later requests are likely to come back to, its end the last.

        Another question about the same pictures goes on behind the last of them, the next turn of a conversation behind the
        messages: the beginning of the assistant's part may be written otherwise when it is history.
        """
        if all(entry.grows for entry in self._manifest.cache):
            return [len(prompt.ids)]  # any length will do
        history = self.prompt(messages, options, answering=False).ids
        limit = min(len(history), len(prompt.ids))
        differing = np.flatnonzero(history[:limit] != prompt.ids[:limit])
        stable, places = int(differing[0]) if len(differing) else limit, prompt.visual_positions
        return sorted({int(places[-1]) + 1 if len(places) else 0, stable, len(prompt.ids)} - {0})

    def room(self, prompt: Prompt) -> int:
        """Tokens that fit behind the prompt."""
        context = self._manifest.text.context_length
        if len(prompt.ids) >= context:
            raise PromptError(
                f"the prompt has {len(prompt.ids):,} tokens ({len(prompt.visual_positions):,} of them visual), but the model's"
                f" context holds {context:,} with the answer; use less text, fewer pictures or a lower max_slice_nums"
            )
        return context - len(prompt.ids)


def shown(messages: Sequence[Message[Part]]) -> list[SlicedPicture | Picture]:
    """All pictures of the messages, a clip's one by one."""
    return [picture for message in messages for part in message.pictures for picture in _frames(part)]


def question(images: PictureSource | Sequence[PictureSource] | None, prompt: str, system: str | None = None) -> Messages:
    """The messages of one question: pictures first, then the text."""
    for text in (prompt, *([] if system is None else [system])):
        if not isinstance(text, str):
            raise PromptError(f"the prompt, or a system prompt, is a text, not {type(text).__name__}")
    if images is None:
        images = []
    several = images if isinstance(images, list | tuple) else [images]
    # among a message's parts a str is text, so a picture's path becomes a Path
    pictures = [Path(image) if isinstance(image, str) else image for image in several]
    asked = {"role": "user", "content": [*pictures, prompt]}
    return [asked] if system is None else [{"role": "system", "content": system}, asked]


def with_encoded(messages: Sequence[Message[Part]], encoded: Sequence[Picture]) -> list[Message[Part]]:
    """The messages with every picture in its encoded form."""
    pictures = iter(encoded)

    def replaced(part: str | Part) -> str | Part:
        if isinstance(part, str):
            return part
        if isinstance(part, Clip):
            return Clip(name=part.name, frames=tuple(next(pictures) for _ in part.frames))
        return next(pictures)

    return [Message(message.role, tuple(map(replaced, message.parts))) for message in messages]


def _frames(part: Part) -> Iterator[SlicedPicture | Picture]:
    yield from part.frames if isinstance(part, Clip) else (part,)


def _grid(part: Part) -> SliceGrid | ClipGrid:
    return ClipGrid(tuple(frame.grid for frame in part.frames)) if isinstance(part, Clip) else part.grid
