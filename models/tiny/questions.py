"""Questions about pictures and their exact answers, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from pictures import Picture
from PIL import Image

ZH_COLOURS = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "orange": "橙色", "black": "黑色", "white": "白色", "yellow": "黄色",
}  # fmt: skip
ZH_SHAPES = {"circle": "圆形", "square": "方形", "triangle": "三角形", "diamond": "菱形", "star": "星形", "cross": "十字形"}

QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "read": (
        ("what does the text say?", "read the text.", "what is written in the picture?", "what text is in the picture?"),
        ("图中写了什么？", "读出图中的文字。"),
    ),
    "first line": (("what does the first line say?", "read the first line."), ("第一行写了什么？",)),
    "second line": (("what does the second line say?", "read the second line."), ("第二行写了什么？",)),
    "text colour": (("what colour is the text?", "what is the colour of the text?"), ("文字是什么颜色？",)),
    "shape": (("what shape is in the picture?", "which shape is it?"), ("图中是什么形状？",)),
    "colour": (("what colour is the shape?", "which colour is the shape?"), ("图中的形状是什么颜色？",)),
    "colour of": (("what colour is the {}?",), ("{}是什么颜色？",)),
    "count": (("how many shapes are in the picture?", "how many shapes are there?"), ("图中有几个形状？",)),
    "count of": (("how many {}s are there?",), ("图中有几个{}？",)),
    "caption": (("describe the picture.", "what is in the picture?"), ("描述这张图。", "图中有什么？")),
    "same shape": (
        ("do both pictures show the same shape?", "is it the same shape in both pictures?"),
        ("两张图的形状相同吗？",),
    ),
    "same colour": (
        ("do both shapes have the same colour?", "is it the same colour in both pictures?"),
        ("两张图的颜色相同吗？",),
    ),
    "which text": (("which picture has text?", "which picture shows text?"), ("哪张图有文字？",)),
    "read first": (("what does the first picture say?",), ("第一张图写了什么？",)),
    "read second": (("what does the second picture say?",), ("第二张图写了什么？",)),
    "shape first": (("what shape is in the first picture?",), ("第一张图是什么形状？",)),
    "shape second": (("what shape is in the second picture?",), ("第二张图是什么形状？",)),
    "read left": (("what is written on the left?",), ("左边写了什么？",)),
    "read right": (("what is written on the right?",), ("右边写了什么？",)),
    "read top": (("what is written at the top?",), ("上面写了什么？",)),
    "read bottom": (("what is written at the bottom?",), ("下面写了什么？",)),
}
"""English and Chinese wordings of each question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Something that can be asked about a scene: a key of `QUESTIONS`, the English and Chinese answer, and the kind of both."""

    name: str
    answers: tuple[str, str]
    kind: str
    argument: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question in one wording, with its one right answer; `kind` is what the accuracy is reported for."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Pictures and a conversation about them, mostly of one turn."""

    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]

    @property
    def images(self) -> list[Image.Image]:
        return [picture.image for picture in self.pictures]

    @property
    def question(self) -> str:
        return self.turns[0].question

    @property
    def answer(self) -> str:
        return self.turns[0].answer

    @property
    def kind(self) -> str:
        return self.turns[0].kind


@dataclass(frozen=True, slots=True)
class Scene:
    """Drawn pictures and everything that can be asked about them."""

    pictures: tuple[Picture, ...]
    queries: tuple[Query, ...]

    def ask(self, rng: Random, turns: int = 1) -> Example:
        """A conversation of up to `turns` different questions, one in three of them Chinese."""
        left = list(self.queries)
        chosen: list[Turn] = []
        while left and len(chosen) < turns:
            (query,) = rng.choices(left, [query.weight for query in left])
            left.remove(query)
            chinese = rng.random() < 0.33
            argument = ZH_SHAPES[query.argument] if chinese and query.argument else query.argument
            wording = rng.choice(QUESTIONS[query.name][chinese]).format(argument).replace("crosss", "crosses")
            if rng.random() < 0.5:
                wording = wording[0].upper() + wording[1:]
            chosen.append(Turn(question=wording, answer=query.answers[chinese], kind=query.kind))
        return Example(pictures=self.pictures, turns=tuple(chosen))


def says(name: str, text: str, kind: str, weight: float = 1.0) -> Query:
    """A question whose answer is the same in both languages."""
    return Query(name=name, answers=(text, text), kind=kind, weight=weight)


def of_colour(name: str, colour: str, kind: str = "colour", argument: str = "", weight: float = 1.0) -> Query:
    return Query(name=name, answers=(colour, ZH_COLOURS[colour]), kind=kind, argument=argument, weight=weight)


def of_shape(name: str, shape: str, kind: str = "shape", weight: float = 1.0) -> Query:
    return Query(name=name, answers=(shape, ZH_SHAPES[shape]), kind=kind, weight=weight)


def described(shapes: list[tuple[str, str]], text: str = "", weight: float = 1.0) -> Query:
    return Query(
        name="caption", answers=(caption(shapes, text, False), caption(shapes, text, True)), kind="caption", weight=weight
    )


def caption(shapes: list[tuple[str, str]], text: str, chinese: bool) -> str:
    """`a red circle and a blue square`, shapes from left to right, the text last."""
    if chinese:
        parts = [f"一个{ZH_COLOURS[colour]}的{ZH_SHAPES[shape]}" for shape, colour in shapes] + (
            [f"文字 {text}"] if text else []
        )
        return "和".join(parts)
    parts = [f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" for shape, colour in shapes] + (
        [f"the text {text}"] if text else []
    )
    return " and ".join(parts)
