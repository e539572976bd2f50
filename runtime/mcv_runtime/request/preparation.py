"""From messages with pictures and videos in them to slices and a prompt; no graph is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mcv_runtime.bundle.manifest import Manifest
from mcv_runtime.documents.document import Document, Page, is_pdf
from mcv_runtime.errors import OptionError, PromptError
from mcv_runtime.pictures.images import ImageSource, describe, picture_size
from mcv_runtime.pictures.picture import Clip, PagePlace, Picture, SlicedPicture, least_grid, pack, slice_picture
from mcv_runtime.pictures.slicing import ClipGrid, Size, SliceGrid
from mcv_runtime.pictures.video import Video, VideoPlan, plan_video
from mcv_runtime.request.options import Options, PictureOptions
from mcv_runtime.text.prompts import Message, Prompt, PromptBuilder, slice_tokens

PictureSource: TypeAlias = "ImageSource | Picture | Video | Clip | Document | Page"
Part: TypeAlias = SlicedPicture | Picture | Clip
Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""`{"role": "system", "user" or "assistant", "content": text}`, or as content a list of texts (str) and pictures (not str).

Where the chat template knows functions, an assistant's message may have `tool_calls`, a list of `{"name": ..., "arguments":
{...}}`, and what they gave is a message of the role `tool`.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Uncut:
    """A picture or video of a request of which nothing was decoded yet."""

    source: ImageSource | VideoPlan | Page
    grid: SliceGrid | ClipGrid
    """How it will be cut, or a way that makes fewer visual tokens."""


class Preparer:
    """Cuts a request's pictures and writes its prompt."""

    def __init__(self, manifest: Manifest, prompts: PromptBuilder, max_pixels: int) -> None:
        self._manifest, self._prompts, self._max_pixels = manifest, prompts, max_pixels

    def prepare(
        self, messages: Messages, options: Options, check: Callable[[], None] = lambda: None
    ) -> tuple[list[Message[Part]], Prompt]:
        """The messages, their pictures cut into slices, and the prompt; what `check` raises now and then ends that.

        What cannot fit is refused before any picture is decoded.
        """
        admitted = self.admit(messages, options, check)
        prompt = self.prompt(admitted, options, check=check)
        self.room(prompt)
        sliced = self._cut_all(admitted, options, check)
        if _grids(sliced) != _grids(admitted):
            prompt = self.prompt(sliced, options, check=check)
            self.room(prompt)
        return sliced, prompt

    def sliced(self, messages: Messages, options: Options, check: Callable[[], None] = lambda: None) -> list[Message[Part]]:
        """The messages, their pictures cut into slices; what `check` raises before one of them ends that."""
        return self._cut_all(self.admit(messages, options, check), options, check)

    def admit(
        self, messages: Messages, options: Options, check: Callable[[], None] = lambda: None
    ) -> list[Message[Part | Uncut]]:
        """The messages with every picture looked at, but not decoded; raises for what is wrong with one, or too much of all."""
        if not isinstance(messages, Sequence):
            raise PromptError("the messages are a list of mappings with `role` and `content`")
        parts = [self._parts(message) for message in messages]
        texts = [part for several in parts for part in several if isinstance(part, str)]
        self._prompts.require_brief(sum(map(len, texts)))
        context = self._manifest.text.context_length
        if (count := len(messages) + sum(map(len, parts))) > context:
            raise PromptError(f"the request has {count:,} messages, texts and pictures, but a context of {context:,} tokens")
        admitted: list[Message[Part | Uncut]] = []
        tokens = 0
        for message, several in zip(messages, parts, strict=True):
            ready: list[str | Part | Uncut] = []
            for part in several:
                check()
                ready.append(
                    part if isinstance(part, str | SlicedPicture | Picture | Clip) else self._look(part, options, check)
                )
                tokens += 0 if isinstance(part, str) else self._tokens(_grid(ready[-1]))  # type: ignore[arg-type]
                if tokens >= context:
                    raise PromptError(
                        f"the pictures make {tokens:,} tokens or more, but the model's context holds {context:,} with the"
                        " answer; use fewer pictures or a lower max_slice_nums"
                    )
            admitted.append(Message(message["role"], tuple(ready), tuple(message.get("tool_calls") or ())))
        return admitted

    def slice(
        self, source: ImageSource | Page, options: PictureOptions, check: Callable[[], None] = lambda: None
    ) -> SlicedPicture:
        """One picture, or page of a document, cut into slices."""
        page, name = None, None
        if isinstance(source, Page):
            page, name = PagePlace(source.number, source.page_size(self._max_pixels)), source.name
            source = source.image(self._max_pixels, check)
        return slice_picture(
            source,
            self._manifest.image,
            max_slice_nums=options.max_slice_nums,
            max_pixels=self._max_pixels,
            downsample_mode=options.downsample_mode,
            small_image_upsize=options.small_image_upsize,
            name=name,
            page=page,
            check=check,
        )

    def clip(self, video: Video, options: PictureOptions, check: Callable[[], None] = lambda: None) -> Clip:
        """One video as pictures; what `check` raises between its frames ends that."""
        return self._cut_plan(self._plan(video, options, check), options, check)

    def prompt(
        self,
        messages: Sequence[Message[Part]] | Sequence[Message[Part | Uncut]],
        options: Options,
        *,
        answering: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> Prompt:
        """The prompt of messages whose pictures were looked at; `answering`: up to where the assistant begins."""
        grids: list[Message[SliceGrid | ClipGrid]] = [
            Message(m.role, tuple(part if isinstance(part, str) else _grid(part) for part in m.parts), m.tool_calls)
            for m in messages
        ]
        return self._prompts.build(
            grids,
            use_image_id=options.use_image_id,
            thinking=bool(options.thinking),
            grounding=bool(options.grounding),
            tools=options.tools or (),
            raw=bool(options.raw),
            answering=answering,
            check=check,
        )

    def _parts(self, message: Any) -> Sequence[Any]:
        if not isinstance(message, Mapping) or not message.keys() >= {"role", "content"}:
            raise PromptError("a message is a mapping with `role` and `content`")
        content = message["content"]
        parts = content if isinstance(content, list | tuple) else [content]
        return [piece for part in parts for piece in self._pages(part)]

    def _pages(self, part: Any) -> Iterable[Any]:
        """The pages of a document in its place; anything else as it is."""
        if is_pdf(part):
            part = Document(part)
        return part.open(self._max_pixels) if isinstance(part, Document) else (part,)

    def _look(
        self, source: ImageSource | Page | Video, options: PictureOptions, check: Callable[[], None]
    ) -> Uncut | SlicedPicture | Clip:
        """A picture or video as large as its header says; cut at once where there is none to look at, as of a pipe."""
        if isinstance(source, Video):
            plan = self._plan(source, options, check)
            sizes = plan.sizes()
            if sizes is None:
                return self._cut_plan(plan, options, check)
            options = self._of_video(options)
            grids = {either: self._fewest(source.name, either, options) for either in set(sizes)}
            return Uncut(plan, ClipGrid(tuple(grids[either] for either in sizes)))
        if isinstance(source, Page):
            return Uncut(source, least_grid(source.name, source.size(self._max_pixels), self._manifest.image, options))
        size = picture_size(source, self._max_pixels)
        if size is None:
            return self.slice(source, options, check)
        return Uncut(source, least_grid(describe(source), size, self._manifest.image, options))

    def _fewest(self, name: str, either: tuple[Size, Size], options: PictureOptions) -> SliceGrid:
        """Of a picture that may be turned by a quarter."""
        return min((least_grid(name, size, self._manifest.image, options) for size in either), key=self._tokens)

    def _tokens(self, grid: SliceGrid | ClipGrid) -> int:
        grids = grid.frames if isinstance(grid, ClipGrid) else (grid,)
        return sum(sum(slice_tokens(self._manifest.placeholder, one)) for one in grids)

    def _plan(self, video: Video, options: PictureOptions, check: Callable[[], None]) -> VideoPlan:
        spec = self._manifest.video
        if spec is None:
            raise OptionError("this model takes pictures, but no videos")
        limits = options.max_num_frames, options.stack_frames
        return plan_video(
            video, spec, max_num_frames=limits[0], stack_frames=limits[1], max_pixels=self._max_pixels, check=check
        )

    def _of_video(self, options: PictureOptions) -> PictureOptions:
        spec = self._manifest.video
        return options if spec is None or options.max_slice_nums else replace(options, max_slice_nums=spec.max_slice_nums)

    def _cut_plan(self, plan: VideoPlan, options: PictureOptions, check: Callable[[], None]) -> Clip:
        options = self._of_video(options)
        shown = plan.moments(max_pixels=self._max_pixels, check=check)
        packs = (pack([self.slice(frame, options) for frame in moment.frames], moment.times) for moment in shown)
        return Clip(name=plan.video.name, frames=tuple(packs))

    def _cut_all(
        self, messages: Sequence[Message[Part | Uncut]], options: Options, check: Callable[[], None]
    ) -> list[Message[Part]]:
        def cut(part: str | Part | Uncut) -> str | Part:
            check()
            if not isinstance(part, Uncut):
                return part
            source = part.source
            return (
                self._cut_plan(source, options, check) if isinstance(source, VideoPlan) else self.slice(source, options, check)
            )

        return [Message(message.role, tuple(map(cut, message.parts)), message.tool_calls) for message in messages]

    def stops(
        self, prompt: Prompt, messages: Sequence[Message[Part]], options: Options, check: Callable[[], None] = lambda: None
    ) -> list[int]:
        """Lengths of a prompt that later requests are likely to come back to, its end the last.

        Another question about the same pictures goes on behind the last of them, the next turn of a conversation behind the
        messages: the beginning of the assistant's part may be written otherwise when it is history.
        """
        if all(entry.grows for entry in self._manifest.cache):
            return [len(prompt.ids)]  # any length will do
        history = self.prompt(messages, options, answering=False, check=check).ids
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

    return [replace(message, parts=tuple(map(replaced, message.parts))) for message in messages]


def _frames(part: Part) -> Iterator[SlicedPicture | Picture]:
    yield from part.frames if isinstance(part, Clip) else (part,)


def _grids(messages: Sequence[Message[Any]]) -> list[SliceGrid | ClipGrid]:
    return [_grid(part) for message in messages for part in message.pictures]


def _grid(part: Part | Uncut) -> SliceGrid | ClipGrid:
    return ClipGrid(tuple(frame.grid for frame in part.frames)) if isinstance(part, Clip) else part.grid
