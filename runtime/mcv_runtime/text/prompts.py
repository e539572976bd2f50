"""Turn messages into the token ids that a model reads, with the places where visual tokens go."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from mcv_runtime.bundle.manifest import PlaceholderSpec, TextSpec
from mcv_runtime.errors import BundleCorruptError, OptionError, PromptError, shown
from mcv_runtime.pictures.slicing import ClipGrid, SliceGrid
from mcv_runtime.text.canvas_positions import Crop, Markers, canvas_positions
from mcv_runtime.text.grounding import MARKS, knows_marks
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

Picture = TypeVar("Picture")
Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
_THOUGHT_MARKS = re.compile(r"(</?think>)")
_CHARACTERS_PER_TOKEN = 32
"""The most that are read for each token of the context. Tokens of text stand for 4, those of runs of spaces for up to 128."""
_PIECE, _SLACK = 1 << 16, 1.1
"""Characters that are tokenized between two looks at the clock; and how far off their tokens may be, counted piece by piece."""


@dataclass(frozen=True, slots=True)
class Message(Generic[Picture]):
    """One turn of a conversation: texts and pictures in the order in which the model shall see them."""

    role: Role
    parts: tuple[str | Picture, ...]
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Of the assistant: `{"name": ..., "arguments": {...}}` each."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"a message has the role {shown(self.role)}; roles are {', '.join(ROLES)}")

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if not isinstance(part, str)]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt ready for the decoder."""

    text: str
    """With placeholders expanded and the user's text as typed."""
    ids: NDArray[np.int64]
    visual_positions: NDArray[np.int64]
    """Ascending indices into `ids` whose embeddings are replaced by visual tokens, in the order of the pictures' slices."""
    positions: NDArray[np.int64] | None = None
    """[3, tokens]: time, row and column of each token; None: they are numbered one after the other."""
    grids: tuple[SliceGrid, ...] = ()
    """How its pictures, and the frames of its videos, are cut."""


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Renders, expands and tokenizes. What a user typed stays text, even where it looks like a control token."""

    tokenizer: TextTokenizer
    template: ChatTemplate
    text: TextSpec
    placeholder: PlaceholderSpec

    def build(
        self,
        messages: Sequence[Message[SliceGrid | ClipGrid]],
        *,
        use_image_id: bool | None = None,
        thinking: bool = False,
        grounding: bool = False,
        answering: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        raw: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> Prompt:
        """The prompt for `messages`, whose pictures and videos are given as their slice grids.

        `raw`: the messages' own text without the template, in which control tokens are the model's own.
        `grounding`: the marks of places (`<ref>`, `<box>` and the like) are the model's own, not text.
        `answering`: up to where the assistant answers; else the messages alone. `check` is called now and then, and may raise.
        """
        if grounding and not knows_marks(self.tokenizer):
            raise OptionError("this model has no marks for places in a picture; leave grounding out")
        if not messages or not messages[-1].text.strip():
            raise PromptError("the prompt is empty")
        calls = [message.tool_calls for message in messages]
        texts = [*(message.text for message in messages), *_strings([tools, calls])]
        self.require_brief(sum(map(len, texts)))
        # A lone surrogate (from a command line or JSON) has no UTF-8 form.
        messages = [replace(m, parts=tuple(_mend(p) if isinstance(p, str) else p for p in m.parts)) for m in messages]
        guard, mark = _unused_characters("".join(texts))
        kept = MARKS if grounding else frozenset()
        if raw:
            kept = self.tokenizer.control - {value for value in asdict(self.placeholder).values() if isinstance(value, str)}
        guarded = [self._content(message, guard, mark, kept) for message in messages]
        if raw:
            rendered = "".join(message["content"] for message in guarded)
        else:
            known = self._foreign(tools, guard)
            rendered = self.template.render(guarded, thinking=thinking, answering=answering, tools=known, check=check)
        visuals = [visual for message in messages for visual in message.pictures]
        between = rendered.split(mark)
        if len(between) != len(visuals) + 1:
            raise PromptError(f"the model's chat template keeps {len(between) - 1} of {len(visuals)} pictures")
        expanded = self._expanded(visuals, use_image_id)
        text = "".join(itertools.chain(*itertools.zip_longest(between, expanded, fillvalue="")))
        self._require_fit(text.replace(guard, ""), check)
        ids = np.array(self.tokenizer.encode(text, guard), dtype=np.int64)
        if not len(ids):
            raise PromptError("the model's chat template makes no prompt of these messages")
        starts, counts = self._slices(ids, visuals)
        return Prompt(
            text.replace(guard, ""),
            ids,
            np.concatenate([np.empty(0, np.int64), *(start + np.arange(n) for start, n in zip(starts, counts, strict=True))]),
            self._canvas(ids, starts, visuals) if self.text.positions == "canvas" else None,
            tuple(_grids(visuals)),
        )

    def require_brief(self, characters: int) -> None:
        """Raise `PromptError` for a text so long that nobody need count its tokens: that would take seconds and gigabytes."""
        most = _CHARACTERS_PER_TOKEN * self.text.context_length
        if characters > most:
            raise PromptError(
                f"the prompt has {characters:,} characters; the model's context holds {self.text.context_length:,} tokens, for"
                f" which at most {most:,} characters are read; use less text"
            )

    def _require_fit(self, text: str, check: Callable[[], None]) -> None:
        """Count the tokens of a long text in pieces, and raise `PromptError` once they are too many."""
        self.require_brief(len(text))
        most, count = self.text.context_length, 0
        for start in range(0, len(text) if len(text) > _PIECE else 0, _PIECE):
            check()
            count += len(self.tokenizer.encode(text[start : start + _PIECE]))
            if count > _SLACK * most:
                raise PromptError(
                    f"the prompt has {count:,} tokens or more, but the model's context holds {most:,} in all; use less text"
                )
        check()

    def _content(self, message: Message[SliceGrid | ClipGrid], guard: str, mark: str, kept: frozenset[str]) -> dict[str, Any]:
        parts = (self._guarded(part, message.role, guard, kept) if isinstance(part, str) else mark for part in message.parts)
        content: dict[str, Any] = {"role": message.role, "content": self.text.part_separator.join(parts)}
        if message.tool_calls:
            calls = self._foreign(message.tool_calls, guard)
            content["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return content

    def _foreign(self, value: Any, guard: str) -> Any:
        """What came as JSON, with all of its texts guarded."""
        if isinstance(value, str):
            return self.tokenizer.guard_text(_mend(value), guard)
        if isinstance(value, Mapping):
            return {self._foreign(key, guard): self._foreign(item, guard) for key, item in value.items()}
        return [self._foreign(item, guard) for item in value] if isinstance(value, list | tuple) else value

    def _guarded(self, text: str, role: Role, guard: str, kept: frozenset[str]) -> str:
        if role == "assistant" and self.template.can_think:  # the template removes earlier thoughts, if it can see them
            pieces = _THOUGHT_MARKS.split(text)
            return "".join(piece if i % 2 else self.tokenizer.guard_text(piece, guard, kept) for i, piece in enumerate(pieces))
        return self.tokenizer.guard_text(text, guard, kept)

    def _expanded(self, visuals: Sequence[SliceGrid | ClipGrid], use_image_id: bool | None) -> list[str]:
        """Placeholder text of each picture and video; pictures are numbered by default, videos on demand."""
        spec = self.placeholder
        with_ids = spec.use_image_id if use_image_id is None else use_image_id
        expand = _STRATEGIES[spec.strategy]
        pictures, videos = itertools.count(), itertools.count()
        return [
            self._clip(visual, next(videos) if use_image_id and spec.video_ids else None)
            if isinstance(visual, ClipGrid)
            else expand(spec, visual, next(pictures) if with_ids else None)
            for visual in visuals
        ]

    def _clip(self, clip: ClipGrid, number: int | None) -> str:
        """Placeholder text of one video: optional number, then its frames like pictures without one.

        Nothing stands between frames with a token of their own; without it, they are pictures like others.
        """
        spec = self.placeholder
        frames = (image_id_slices(spec, grid, None, spec.video_token) for grid in clip.frames)
        return _image_id(spec, number) + (self.text.part_separator if spec.video_token is None else "").join(frames)

    def _slices(self, ids: NDArray[np.int64], visuals: Sequence[SliceGrid | ClipGrid]) -> tuple[NDArray[np.int64], list[int]]:
        """Where each slice's visual tokens begin, and how many they are."""
        spec = self.placeholder
        opening = [spec.image_start] if spec.strategy == "bracketed_slices" else [spec.image_start, spec.slice_start]
        starts = np.flatnonzero(np.isin(ids, [self.tokenizer.id_of(token) for token in opening])) + 1
        counts = [count for grid in _grids(visuals) for count in slice_tokens(spec, grid)]
        tokens = [spec.token] if spec.video_token is None else [spec.token, spec.video_token]
        total = int(np.isin(ids, [self.tokenizer.id_of(token) for token in tokens]).sum())
        if len(starts) != len(counts) or total != sum(counts):
            raise BundleCorruptError("the tokenizer does not keep the picture placeholders whole")
        return starts, counts

    def _canvas(
        self, ids: NDArray[np.int64], starts: NDArray[np.int64], visuals: Sequence[SliceGrid | ClipGrid]
    ) -> NDArray[np.int64]:
        spec, newline = self.placeholder, self.text.newline_id
        shapes = [shape for grid in _grids(visuals) for shape in grid.token_shapes or ()]
        if newline is None or len(shapes) != len(starts):
            raise BundleCorruptError("the manifest asks for positions on a canvas, but lacks what they need")
        names = ("image_start", "image_end", "slice_start", "slice_end")
        markers = Markers(newline=newline, **{name: self.tokenizer.id_of(getattr(spec, name)) for name in names})
        crops = [Crop(int(start), rows, columns) for start, (rows, columns) in zip(starts, shapes, strict=True)]
        return canvas_positions(ids, crops, markers)


def slice_tokens(spec: PlaceholderSpec, grid: SliceGrid) -> list[int]:
    """Visual tokens of each slice of a picture."""
    if spec.tokens_per_slice is not None:
        return [spec.tokens_per_slice] * len(grid.sizes)
    if grid.token_shapes is None:
        raise BundleCorruptError("the manifest does not say how many tokens stand for a slice")
    return [rows * columns for rows, columns in grid.token_shapes]


def image_id_slices(spec: PlaceholderSpec, grid: SliceGrid, number: int | None, token: str | None = None) -> str:
    """Placeholder text of one picture: optional number, the overview, then the cells, rows joined by a newline."""
    overview, *cells = ((token or spec.token) * count for count in slice_tokens(spec, grid))
    written = [spec.slice_start + cell + spec.slice_end for cell in cells]
    rows = ["".join(written[start : start + grid.columns]) for start in range(0, len(written), grid.columns or 1)]
    return _image_id(spec, number) + spec.image_start + overview + spec.image_end + "\n".join(rows)


def _image_id(spec: PlaceholderSpec, number: int | None) -> str:
    return "" if number is None else f"{spec.image_id_start}{number}{spec.image_id_end}"


def _grids(visuals: Sequence[SliceGrid | ClipGrid]) -> Iterator[SliceGrid]:
    for visual in visuals:
        yield from visual.frames if isinstance(visual, ClipGrid) else (visual,)


def bracketed_slices(spec: PlaceholderSpec, grid: SliceGrid, number: int | None) -> str:
    """Placeholder text of one picture: the overview, then all cells, written alike, between one pair of brackets."""
    piece = spec.image_start + spec.token * slice_tokens(spec, grid)[0] + spec.image_end
    if not grid.columns:
        return piece
    return piece + spec.slice_start + "\n".join([piece * grid.columns] * grid.rows) + spec.slice_end


_STRATEGIES = {"image_id_slices": image_id_slices, "bracketed_slices": bracketed_slices}


def _unused_characters(text: str) -> tuple[str, str]:
    """Two characters that `text` does not hold: Unicode noncharacters, which no tokenizer or template gives a meaning."""
    used = frozenset(text)
    unused = (c for c in map(chr, itertools.chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))) if c not in used)
    pair = tuple(itertools.islice(unused, 2))
    if len(pair) < 2:
        raise PromptError("the prompt holds every private character there is; leave some out")
    return pair[0], pair[1]


def _strings(value: Any) -> Iterator[str]:
    """All texts in what came as JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in itertools.chain(*value.items()) if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _mend(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
