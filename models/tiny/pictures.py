"""What the tiny model is shown: pictures drawn with Pillow, and what lies where in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (215, 30, 40),
    "green": (25, 145, 60),
    "blue": (35, 70, 215),
    "purple": (140, 45, 165),
    "orange": (245, 130, 20),
    "black": (15, 15, 20),
    "white": (245, 245, 245),
    "yellow": (250, 215, 40),
}
"""Names and RGB; drawn with a little jitter."""

LIGHT_INKS = ("red", "green", "blue", "purple", "orange", "black")
DARK_INKS = ("white", "yellow", "orange")
LIGHT_PAPERS = ((255, 255, 255), (255, 255, 255), (240, 240, 235), (225, 230, 240))
DARK_PAPERS = ((10, 10, 15), (20, 25, 60))

SLICE = 112
"""Side of a slice in pixels (`scale_resolution`); pictures of a larger area are cut."""

WORDS = (
    "APPLE", "BACK", "BIRD", "BLUE", "BOOK", "BOX", "BREAD", "CAFE", "CAKE", "CAT", "CITY", "CLOUD", "COFFEE", "CUP",
    "DANCE", "DESK", "DOG", "DOOR", "DREAM", "EAGLE", "EARTH", "EAST", "EXIT", "FIRE", "FISH", "FIVE", "FLOWER", "FOX",
    "FROG", "FUEL", "GARDEN", "GATE", "GOLD", "GRAPE", "GREEN", "HAND", "HELLO", "HELP", "HOME", "HORSE", "HOTEL",
    "HOUSE", "ICE", "IDEA", "ISLAND", "JAZZ", "JUICE", "JUMP", "KEY", "KING", "KITE", "KIWI", "LAKE", "LAMP", "LEMON",
    "LIGHT", "LION", "MAGIC", "MAP", "MENU", "MILK", "MOON", "MUSIC", "NIGHT", "NORTH", "OCEAN", "OPEN", "ORANGE",
    "PAPER", "PARK", "PHONE", "PIANO", "PIZZA", "QUEEN", "QUICK", "QUIET", "RADIO", "RAIN", "RED", "RIVER", "ROAD",
    "SALE", "SALT", "SHIP", "SILVER", "SNOW", "SOUP", "SOUTH", "STAR", "STOP", "SUGAR", "SUMMER", "SUN", "TABLE", "TAXI",
    "TEA", "TICKET", "TIGER", "TIME", "TRAIN", "TREE", "TWO", "UNDER", "VIEW", "VOICE", "WATER", "WEST", "WINDOW",
    "WINTER", "WOLF", "WORLD", "XRAY", "YELLOW", "YES", "ZEBRA", "ZERO", "ZONE", "ZOO",
)  # fmt: skip

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One glyph or shape: `box` is (left, top, right, bottom) in pixels, `index` counts from 1 within its line or row."""

    box: tuple[float, float, float, float]
    label: str
    index: int
    colour: str
    line: int = 1

    def enlarged(self, factor: float) -> Mark:
        x0, y0, x1, y1 = self.box
        return replace(self, box=(x0 * factor, y0 * factor, x1 * factor, y1 * factor))

    @property
    def is_glyph(self) -> bool:
        return len(self.label) == 1


@dataclass(slots=True)
class Picture:
    """A canvas and the marks drawn on it so far."""

    image: Image.Image
    dark: bool
    marks: list[Mark] = field(default_factory=list)

    def enlarged(self, factor: float) -> Picture:
        """The same picture `factor` times as large."""
        width, height = (round(side * factor) for side in self.image.size)
        marks = [
            replace(mark, box=(x0 * factor, y0 * factor, x1 * factor, y1 * factor))
            for mark in self.marks
            for x0, y0, x1, y1 in [mark.box]
        ]
        return Picture(self.image.resize((width, height), Image.Resampling.LANCZOS), self.dark, marks)

    @property
    def inks(self) -> tuple[str, ...]:
        return DARK_INKS if self.dark else LIGHT_INKS


def blank(rng: Random, width: int, height: int) -> Picture:
    """Paper of one plain colour, dark in one picture of five."""
    dark = rng.random() < 0.2
    return Picture(Image.new("RGB", (width, height), rng.choice(DARK_PAPERS if dark else LIGHT_PAPERS)), dark)


def single_size(rng: Random) -> tuple[int, int]:
    """Width and height of a picture that stays one slice: mostly the slice, else sides of 88-132 pixels, no more area."""
    if rng.random() < 0.85:
        return SLICE, SLICE
    width = rng.randint(90, 132)
    return width, rng.randint(88, min(132, SLICE * SLICE // width))


def random_string(rng: Random, longest: int) -> str:
    """A word of the list, a number, or random letters and digits: 1 to `longest` characters."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice([word for word in WORDS if len(word) <= longest] or ["A"])
    alphabet = GLYPHS[26:] if kind < 0.55 else GLYPHS[:26] if kind < 0.75 else GLYPHS
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, longest)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lettering:
    """Font size, cell width and line height in pixels; each character is centred in its own cell."""

    font_size: int
    advance: int
    height: int
    bold: bool


def lettering(rng: Random, longest_line: int, area: tuple[int, int, int, int]) -> Lettering:
    """A random size at which `longest_line` characters fit into `area` and every cell covers a patch of its own."""
    width = area[2] - area[0]
    least = max(16, math.ceil(width / 8))
    advance = max(least, min(rng.randint(least, 19), width // longest_line))
    font_size = round(advance * rng.uniform(1.04, 1.16))
    return Lettering(
        font_size=font_size, advance=advance, height=max(round(font_size * 0.72) + 3, least), bold=rng.random() < 0.4
    )


def write(picture: Picture, rng: Random, text: str, left: int, top: int, style: Lettering, colour: str, line: int = 1) -> None:
    """Draw `text` with its first cell's corner at (left, top), and note each glyph."""
    ink = jitter(rng, COLOURS[colour])
    for index, character in enumerate(text):
        x = left + index * style.advance
        mask = glyph_mask(character, style)
        picture.image.paste(ink, (x - (mask.width - style.advance) // 2, top), mask)
        box = (x, top, x + style.advance, top + style.height)
        picture.marks.append(Mark(box=box, label=character, index=index + 1, colour=colour, line=line))


@cache
def glyph_mask(character: str, style: Lettering) -> Image.Image:
    """The character's coverage, two pixels wider than its cell on both sides (W and M need them), on the middle of the line."""
    font = ImageFont.load_default(style.font_size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    mask = Image.new("L", (style.advance + 4, style.height), 0)
    base = (style.height + round(style.font_size * 0.72)) / 2
    stroke = 0.4 if style.bold else 0
    ImageDraw.Draw(mask).text((mask.width / 2, base), character, fill=255, font=font, anchor="ms", stroke_width=stroke)
    return mask


def draw_shape(picture: Picture, rng: Random, shape: str, box: tuple[int, int, int, int], colour: str, index: int) -> None:
    """Fill `shape` into `box`, smoothed by drawing it four times as large."""
    side = box[2] - box[0]
    big = Image.new("L", (side * 4, side * 4), 0)
    pen = ImageDraw.Draw(big)
    s = side * 4 - 1
    if shape == "circle":
        pen.ellipse((0, 0, s, s), fill=255)
    elif shape == "square":
        pen.rectangle((s * 0.06, s * 0.06, s * 0.94, s * 0.94), fill=255)
    elif shape == "cross":
        pen.rectangle((s * 0.35, 0, s * 0.65, s), fill=255)
        pen.rectangle((0, s * 0.35, s, s * 0.65), fill=255)
    else:
        pen.polygon([(x * s, y * s) for x, y in OUTLINES[shape]], fill=255)
    picture.image.paste(jitter(rng, COLOURS[colour]), box[:2], big.resize((side, side), Image.Resampling.BOX))
    picture.marks.append(Mark(box=box, label=shape, index=index, colour=colour))


OUTLINES = {
    "triangle": ((0.5, 0.04), (1.0, 0.95), (0.0, 0.95)),
    "diamond": ((0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)),
    "star": (
        (0.5, 0.0), (0.62, 0.35), (1.0, 0.36), (0.69, 0.59), (0.81, 0.95),
        (0.5, 0.73), (0.19, 0.95), (0.31, 0.59), (0.0, 0.36), (0.38, 0.35),
    ),
}  # fmt: skip
"""Corners of the polygons in a unit square."""


def jitter(rng: Random, colour: RGB, amount: int = 15) -> RGB:
    """A nearby colour."""
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


Area = tuple[int, int, int, int]


def place_text(picture: Picture, rng: Random, lines: list[str], area: Area) -> list[str]:
    """Write one or two lines somewhere in `area`; returns each line's colour."""
    left, top, right, bottom = area
    style = lettering(rng, max(map(len, lines)), area)
    gap = rng.randint(2, 8 if len(lines) < 3 else 4)
    height = len(lines) * style.height + (len(lines) - 1) * gap
    y = rng.randint(top, max(top, bottom - height))
    colour = rng.choice(picture.inks)
    colours = []
    for number, text in enumerate(lines, 1):
        x = rng.randint(left, max(left, right - len(text) * style.advance))
        write(picture, rng, text, x, y, style, colour, number)
        colours.append(colour)
        y += style.height + gap
        colour = rng.choice(picture.inks)
    return colours


def place_shapes(picture: Picture, rng: Random, shapes: list[tuple[str, str]], area: Area) -> None:
    """Draw (shape, colour) pairs from left to right in columns of equal width."""
    left, top, right, bottom = area
    column = (right - left) / len(shapes)
    for index, (shape, colour) in enumerate(shapes):
        largest = int(min(column - 2, bottom - top - 2, 60))
        side = rng.randint(min(24, largest), largest)
        x = rng.randint(
            round(left + index * column), max(round(left + index * column), int(left + (index + 1) * column) - side)
        )
        y = rng.randint(top, bottom - side)
        draw_shape(picture, rng, shape, (x, y, x + side, y + side), colour, index + 1)
