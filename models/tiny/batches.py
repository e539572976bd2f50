"""Examples as the model reads them: patches, token ids, and a dense label for every patch and visual token."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from pictures import COLOURS, GLYPHS, SHAPES, SLICE, Mark
from questions import Example
from scenes import MAKERS
from tokenizers import Tokenizer
from torch import Tensor

from mcv_runtime.bundle.manifest import ImageSpec, PlaceholderSpec, TextSpec
from mcv_runtime.pictures.patches import PatchedSlice, cut, patch_slice
from mcv_runtime.pictures.slicing import Size, SliceGrid, adaptive_grid
from mcv_runtime.text.prompts import Message, PromptBuilder
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer

QUERIES = 8
"""The visual tokens of a slice are trained to be a grid of this side."""

LABEL_SIZES = [len(GLYPHS) + 1, 9, 6, len(SHAPES) + 1, 5, len(COLOURS) + 1]
"""Classes of each dense label, 0 being none: glyph, its place in the line, line, shape, its place in the row, colour."""

IGNORE = -100

TURNS = (1, 2, 4)
"""Numbers of questions in a training conversation: a later one costs a tenth of a picture of its own."""

SMALLEST_GLYPH, LARGEST_GLYPH = 13.0, 26.0
"""Cell widths in slice pixels outside of which a glyph's label is left open."""

COLOUR_NUMBER = {colour: number for number, colour in enumerate(COLOURS, 1)}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example, ready for a batch."""

    ids: list[int]
    prompt_length: int
    predicted: list[int]
    """Indices into `ids` of what the model says: the answers' tokens, each answer with its end."""
    vision_positions: list[int]
    slices: list[PatchedSlice]
    patch_labels: list[NDArray[np.int64]]
    query_labels: list[NDArray[np.int64]]

    @property
    def shape_key(self) -> tuple[tuple[int, int], ...]:
        return tuple((piece.rows, piece.columns) for piece in self.slices)


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples whose slices have equal grids, padded at the right to one length."""

    input_ids: Tensor  # [B, T]
    vision_positions: Tensor  # [B * visual tokens], flat indices into B * T
    logit_positions: Tensor  # [R], likewise: the positions that predict an answer token
    targets: Tensor  # [R], or IGNORE
    answered: bool  # whether the answers are trained, or the dense labels alone
    pixels: list[Tensor]  # per slice of an example: [B, L, 3 * p * p]
    position_ids: list[Tensor]  # per slice: [L]
    patch_positions: list[Tensor]  # per slice: [L, 2]
    patch_labels: list[Tensor]  # per slice: [B, L, labels]
    query_labels: list[Tensor]  # per slice: [B, queries, labels]


class Encoder:
    """Turns examples into token ids and patches with the runtime's own preprocessing and prompts."""

    def __init__(self, folder: Path, image: ImageSpec) -> None:
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.tokenizer, self.image = Tokenizer.from_str(tokenizer), image
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.end: int = self.tokenizer.encode("<|im_end|>").ids[0]
        self.prompts = PromptBuilder(
            TextTokenizer(tokenizer),
            ChatTemplate(settings["chat_template"]),
            TextSpec(vocab_size=self.vocab_size, context_length=4096),
            PlaceholderSpec(token="<unk>", tokens_per_slice=QUERIES * QUERIES),
        )

    def __call__(self, example: Example) -> Encoded:
        slices, patch_labels, query_labels = [], [], []
        grids = [adaptive_grid(image.size, self.image) for image in example.images]
        for picture, grid in zip(example.pictures, grids, strict=True):
            for piece, region in zip(cut(picture.image, grid), regions(picture.image.size, grid), strict=True):
                patched = patch_slice(piece, self.image)
                slices.append(patched)
                patch_labels.append(dense_labels(picture.marks, region, piece.size, patched.rows, patched.columns))
                query_labels.append(dense_labels(picture.marks, region, piece.size, QUERIES, QUERIES))
        prompt = self.prompts.build([Message("user", (*grids, example.question))])
        ids: list[int] = prompt.ids.tolist()
        predicted: list[int] = []
        for number, turn in enumerate(example.turns):
            if number:
                ids += self.tokenizer.encode(f"\n<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n").ids
            answer = [*self.tokenizer.encode(turn.answer).ids, self.end]
            predicted += range(len(ids), len(ids) + len(answer))
            ids += answer
        return Encoded(ids, len(prompt.ids), predicted, prompt.visual_positions.tolist(), slices, patch_labels, query_labels)


def regions(size: Size, grid: SliceGrid) -> Iterator[tuple[float, float, float, float]]:
    """What part of the picture each slice shows: (left, top, right, bottom) in the picture's pixels."""
    width, height = size
    yield 0, 0, width, height
    for row in range(grid.rows):
        for column in range(grid.columns):
            cell_width, cell_height = width / grid.columns, height / grid.rows
            yield column * cell_width, row * cell_height, (column + 1) * cell_width, (row + 1) * cell_height


def dense_labels(
    marks: list[Mark], region: tuple[float, float, float, float], size: Size, rows: int, columns: int
) -> NDArray[np.int64]:
    """What lies under the centre of each cell of a `rows` x `columns` grid over a slice: [cells, labels]."""
    left, top, right, bottom = region
    x = left + (np.arange(columns) + 0.5) * ((right - left) / columns)
    y = top + (np.arange(rows) + 0.5) * ((bottom - top) / rows)
    labels = np.zeros((rows, columns, len(LABEL_SIZES)), np.int64)
    for mark in marks:
        x0, y0, x1, y1 = mark.box
        inside = (slice(*np.searchsorted(y, (y0, y1))), slice(*np.searchsorted(x, (x0, x1))))
        colour = COLOUR_NUMBER[mark.colour]
        if not mark.is_glyph:
            labels[inside] = (0, 0, 0, SHAPES.index(mark.label) + 1, mark.index, colour)
        elif SMALLEST_GLYPH <= (x1 - x0) * size[0] / (right - left) <= LARGEST_GLYPH:
            labels[inside] = (GLYPHS.index(mark.label) + 1, mark.index, mark.line, 0, 0, colour)
        else:
            labels[inside] = (IGNORE, IGNORE, IGNORE, 0, 0, IGNORE)
    return labels.reshape(rows * columns, -1)


def collate(examples: list[Encoded], *, answered: bool = True) -> Batch:
    """Examples of one `shape_key` as a batch."""
    # The last token is only predicted. Few different shapes, since a CPU's matrix kernels are compiled for each.
    length = -(-(max(len(example.ids) for example in examples) - 1) // 16) * 16
    input_ids = np.zeros((len(examples), length), np.int64)
    vision, positions, targets = [], [], []
    for number, example in enumerate(examples):
        input_ids[number, : len(example.ids) - 1] = example.ids[:-1]
        vision += [number * length + index for index in example.vision_positions]
        positions += [number * length + index - 1 for index in example.predicted]
        targets += [example.ids[index] for index in example.predicted]
    missing = -len(targets) % 32
    positions += [0] * missing
    targets += [IGNORE] * missing
    across = list(zip(*(example.slices for example in examples), strict=True))

    def stack(arrays: list[list[NDArray[np.int64]]]) -> list[Tensor]:
        return [torch.from_numpy(np.stack(group)) for group in zip(*arrays, strict=True)]

    return Batch(
        torch.from_numpy(input_ids),
        torch.tensor(vision),
        torch.tensor(positions),
        torch.tensor(targets),
        answered,
        [torch.from_numpy(np.stack([piece.pixel_values for piece in group])) for group in across],
        [torch.from_numpy(group[0].position_ids) for group in across],
        [torch.from_numpy(group[0].patch_positions) for group in across],
        stack([example.patch_labels for example in examples]),
        stack([example.query_labels for example in examples]),
    )


def batch_size(slices: int) -> int:
    """Examples of a batch by slices of an example: about as many patches in each."""
    return {1: 16, 2: 12}.get(slices, max(4, 28 // slices))


class Stream(torch.utils.data.IterableDataset[Batch]):
    """An endless, seeded stream of batches; examples wait until enough of the same slice grids are there."""

    def __init__(self, encoder: Encoder, mixture: dict[str, float], seed: str, *, unanswered: Collection[str]) -> None:
        self.encoder, self.mixture, self.seed, self.unanswered = encoder, mixture, seed, unanswered

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        rng = Random(f"train {self.seed} {worker.id if worker else 0}")
        names, weights = list(self.mixture), list(self.mixture.values())
        waiting: dict[object, list[Encoded]] = defaultdict(list)
        while True:
            (name,) = rng.choices(names, weights)
            answered = name not in self.unanswered
            turns = rng.choice(TURNS) if answered else 1  # batches of equal turns have little padding
            encoded = self.encoder(MAKERS[name](rng).ask(rng, turns))
            group = waiting[encoded.shape_key, turns, answered]
            group.append(encoded)
            if len(group) == batch_size(len(encoded.slices)):
                yield collate(group, answered=answered)
                group.clear()


def tiny_image_spec(max_slice_nums: int = 9) -> ImageSpec:
    """How the tiny model's pictures are prepared."""
    return ImageSpec(
        patch_size=14,
        scale_resolution=SLICE,
        max_slice_nums=max_slice_nums,
        slice_mode=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        position_table_side=16,
    )
