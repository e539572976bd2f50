"""Where something is in a picture: how to ask a model for it, and how to read its answer.

Source: the maintainers in OpenBMB/MiniCPM-V#982 and #185, and the cookbook of MiniCPM-V 4.6. What is looked for stands between
the marks `<ref>` and `</ref>`; the answer says `<box>x1 y1 x2 y2</box>` (or `<quad>` with four corners, `<point>` with one), in
thousandths of the picture's width and height. Marks are tokens: typed, they are text unless a request says `grounding`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mcv_runtime.errors import PromptError
from mcv_runtime.text.tokens import TextTokenizer

Shape = Literal["box", "quad", "point"]
_CORNERS: dict[str, int] = {"box": 2, "quad": 4, "point": 1}
_SCALE = 1000
MARKS = frozenset(mark for name in ("ref", *get_args(Shape)) for mark in (f"<{name}>", f"</{name}>"))
_SAID = re.compile(
    r"<ref>(?P<label>.*?)</ref>|<(?P<shape>box|quad|point)>(?P<numbers>[-\d\s.,;()\[\]]*)</(?P=shape)>", re.DOTALL
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"


@dataclass(frozen=True, slots=True)
class Region:
    """A place in a picture."""

    shape: Shape
    points: tuple[tuple[int, int], ...]
    """(x, y) in pixels of the upright picture, or points of a PDF's page: the upper left and lower right corner of a box, the
    four of a quad, or one."""
    label: str = ""
    """What the answer says is there, if it does."""


def locate(what: str) -> str:
    """The published question where in a picture something is; to be asked with `grounding=True`."""
    if not what.strip() or any(mark in what for mark in MARKS):
        raise PromptError("say in words what is to be found, without marks")
    return _QUESTION.format(what)


def knows_marks(tokenizer: TextTokenizer) -> bool:
    """Whether a model has tokens to ask where something is, and to say so."""
    return all(tokenizer.is_control(mark) for mark in ("<ref>", "</ref>", "<box>", "</box>"))


def mark_ids(tokenizer: TextTokenizer) -> frozenset[int]:
    """Ids of the marks that a model has."""
    return frozenset(tokenizer.id_of(mark) for mark in MARKS if tokenizer.is_control(mark))


def find_regions(text: str, size: tuple[int, int]) -> tuple[Region, ...]:
    """The places that an answer names, in order, in a picture of (width, height); what is no place is left out."""
    return tuple(_regions(text.rpartition("</think>")[2], size))


def _regions(text: str, size: tuple[int, int]) -> Iterator[Region]:
    label = ""
    for said in _SAID.finditer(text):
        if said["shape"] is None:
            label = said["label"].strip()
            continue
        numbers = [min(max(float(number), 0), _SCALE) for number in _NUMBER.findall(said["numbers"])]
        corners = _CORNERS[said["shape"]]
        if len(numbers) % (2 * corners):
            continue
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        points = [(int(x * size[0] / _SCALE), int(y * size[1] / _SCALE)) for x, y in pairs]
        for start in range(0, len(points), corners):
            shape: Shape = said["shape"]  # type: ignore[assignment]
            yield Region(shape, tuple(points[start : start + corners]), label)
