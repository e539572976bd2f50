"""Pictures for calibration that are made on a computer: pages of text, charts, tables, shapes, screens."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Size = tuple[int, int]
"""(width, height) in pixels."""
RGB = tuple[int, int, int]

_WORDS = (
    "the", "of", "a", "and", "report", "total", "value", "increase", "2024", "figure", "system", "table", "light", "water",
    "between", "annual", "cost", "Energy", "market", "price", "number", "Section", "3.1", "city", "House", "under",
    "measured", "result", "$1,250", "98.6%", "(see", "note)", "QUARTER", "Revenue", "email@site.org", "river", "green",
)  # fmt: skip


def page(rng: np.random.Generator, size: Size) -> Image.Image:
    """A title and paragraphs, in one column or two, some in strokes that look like Chinese at a distance."""
    picture, draw, ink = _paper(rng, size)
    width, height = size
    body = max(int(rng.uniform(9, 22) * min(size) / 500), 7)
    columns = 2 if width > 600 and rng.random() < 0.5 else 1
    margin, chinese = width // 16, rng.random() < 0.4
    draw.text((margin, margin // 2), _line(rng, 4).title(), fill=ink, font=_font(body * 1.8))
    for column in range(columns):
        left = margin + column * (width - margin) // columns
        right = margin + (column + 1) * (width - margin) // columns - margin
        top = margin // 2 + body * 3.0
        while top < height - body * 2:
            if rng.random() < 0.12:
                top += body * 1.2
            elif chinese:
                _strokes(draw, rng, (left, top, right, top + body), ink)
            else:
                draw.text((left, top), _fitting(draw, rng, body, right - left), fill=ink, font=_font(body))
            top += body * 1.5
    return picture


def chart(rng: np.random.Generator, size: Size) -> Image.Image:
    """Bars, lines or a pie, with axes and labels."""
    picture, draw, ink = _paper(rng, size)
    width, height = size
    font, count = _font(max(min(size) / 28, 7)), int(rng.integers(4, 10))
    values = rng.uniform(0.1, 1, count)
    left, top, right, bottom = width * 0.12, height * 0.14, width * 0.95, height * 0.86
    draw.text((left, top / 4), _line(rng, 3).title(), fill=ink, font=font)
    kind = rng.integers(0, 3)
    if kind == 2:
        angle, side = 0.0, min(right - left, bottom - top)
        for share in values / values.sum():
            draw.pieslice((left, top, left + side, top + side), angle, angle + 360 * share, fill=_colour(rng), outline=ink)
            angle += 360 * share
        return picture
    for step in range(5):
        y = bottom - (bottom - top) * step / 4
        draw.line((left, y, right, y), fill=(200, 200, 200))
        draw.text((2, y - 6), str(step * 25), fill=ink, font=font)
    draw.line((left, top, left, bottom, right, bottom), fill=ink, width=2)
    spacing, colour = (right - left) / count, _colour(rng)
    if kind == 0:
        for number, value in enumerate(values):
            x = left + spacing * (number + 0.2)
            draw.rectangle((x, bottom - value * (bottom - top), x + spacing * 0.6, bottom), fill=colour, outline=ink)
            draw.text((x, bottom + 3), str(2015 + number), fill=ink, font=font)
    else:
        for _ in range(int(rng.integers(1, 4))):
            walk = np.clip(0.5 + np.cumsum(rng.normal(0, 0.12, count)), 0, 1)
            points = [(left + spacing * (n + 0.5), bottom - v * (bottom - top)) for n, v in enumerate(walk)]
            draw.line(points, fill=_colour(rng), width=3, joint="curve")
    return picture


def table(rng: np.random.Generator, size: Size) -> Image.Image:
    """Ruled cells with words and numbers, the head shaded."""
    picture, draw, ink = _paper(rng, size)
    width, height = size
    columns, rows = int(rng.integers(3, 7)), int(rng.integers(5, 16))
    font, head = _font(max(min(width / columns / 6, height / rows / 2), 7)), _colour(rng)
    across, down = (width - 20) / columns, (height - 20) / rows
    for row in range(rows):
        for column in range(columns):
            box = (10 + column * across, 10 + row * down, 10 + (column + 1) * across, 10 + (row + 1) * down)
            draw.rectangle(box, fill=head if row == 0 else None, outline=ink)
            text = _line(rng, 1) if row == 0 or column == 0 else f"{rng.uniform(0, 9999):,.1f}"
            draw.text((box[0] + 4, box[1] + down / 4), text, fill=ink, font=font)
    return picture


def shapes(rng: np.random.Generator, size: Size) -> Image.Image:
    """Flat shapes on a plain ground."""
    picture = Image.new("RGB", size, _colour(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 12))):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        radius, corners = min(size) * rng.uniform(0.05, 0.25), int(rng.integers(2, 7))
        if corners == 2:
            draw.ellipse(
                (x - radius, y - radius, x + radius, y + radius * 0.8), fill=_colour(rng), outline=_colour(rng), width=3
            )
        else:
            draw.regular_polygon((x, y, radius), corners, rotation=float(rng.uniform(0, 360)), fill=_colour(rng))
    return picture


def screen(rng: np.random.Generator, size: Size) -> Image.Image:
    """Windows, buttons and lists of a program."""
    picture = Image.new("RGB", size, (236, 238, 242) if rng.random() < 0.6 else (30, 32, 38))
    draw, font = ImageDraw.Draw(picture), _font(max(min(size) / 36, 7))
    dark = picture.getpixel((0, 0)) == (30, 32, 38)
    panel, ink = ((48, 50, 58), (225, 225, 230)) if dark else ((255, 255, 255), (30, 30, 35))
    width, height = size
    draw.rectangle((0, 0, width, height // 14), fill=_colour(rng))
    draw.rectangle((0, height // 14, width // 5, height), fill=panel)
    for row in range(12):
        y = height // 10 + row * height // 13
        draw.text((8, y), _line(rng, 1), fill=ink, font=font)
        x = width // 5 + 12
        draw.rounded_rectangle((x, y, width - 12, y + height // 16), 6, fill=panel, outline=(150, 150, 160))
        draw.ellipse((x + 6, y + 4, x + height // 18, y + height // 18), fill=_colour(rng))
        draw.text((x + height // 14, y + 4), _fitting(draw, rng, font.size, width * 0.6), fill=ink, font=font)
    return picture


def _paper(rng: np.random.Generator, size: Size) -> tuple[Image.Image, ImageDraw.ImageDraw, RGB]:
    """White or tinted paper with dark ink; now and then the other way round."""
    dark = rng.random() < 0.15
    level = rng.integers(10, 40, 3) if dark else 255 - rng.integers(0, 25, 3) * rng.integers(0, 2)
    picture = Image.new("RGB", size, (int(level[0]), int(level[1]), int(level[2])))
    return picture, ImageDraw.Draw(picture), (235, 235, 225) if dark else (20, 20, 30)


def _font(points: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(float(points))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _line(rng: np.random.Generator, words: int) -> str:
    return " ".join(str(word) for word in rng.choice(_WORDS, words))


def _fitting(draw: ImageDraw.ImageDraw, rng: np.random.Generator, points: float, room: float) -> str:
    """Words up to a width in pixels."""
    text, font = _line(rng, 1), _font(points)
    while draw.textlength(longer := f"{text} {_line(rng, 1)}", font=font) < room:
        text = longer
    return text


def _strokes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: tuple[float, float, float, float], ink: RGB) -> None:
    """A line of square characters made of strokes, for no font that comes with Pillow has Chinese ones."""
    left, top, right, bottom = box
    side = bottom - top
    for x in np.arange(left, right - side, side * 1.1):
        for _ in range(int(rng.integers(3, 9))):
            at, length = rng.uniform(0, side, 2), rng.uniform(0.3, 1) * side
            start = (x + at[0] * 0.5, top + at[1])
            upright = (start[0] + rng.uniform(-0.3, 0.3) * side, min(top + length, bottom))
            end = upright if rng.random() < 0.5 else (x + side, start[1])
            draw.line((*start, *end), fill=ink, width=max(int(side / 12), 1))


def _colour(rng: np.random.Generator) -> RGB:
    red, green, blue = (int(level) for level in rng.integers(20, 245, 3))
    return red, green, blue
