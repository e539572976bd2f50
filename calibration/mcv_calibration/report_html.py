"""The report as one HTML page that needs nothing else: `report.html`."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.resources import files

import jinja2
from PIL import Image

from mcv_calibration.distances import Histogram
from mcv_calibration.layer_errors import LayerError, worst_layers
from mcv_calibration.precisions import PRECISIONS
from mcv_calibration.report import Report
from mcv_calibration.samples import Sample
from mcv_runtime.pictures.images import open_picture

_SIDE = 240
"""Pixels of a thumbnail's longer side."""
_SHOWN = 24
"""Samples that are shown with pictures."""
_FULL_DB = 60.0
"""Signal to noise of a bar of full height."""
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, and whether the reference's has it too."""

    text: str
    same: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """Of a chart: its height from 0 to 1, what stands below it, what is said about it, and the class of its colour."""

    height: float
    label: str
    title: str
    kind: str = ""


def render(report: Report, samples: Sequence[Sample]) -> str:
    """The page of a report on these samples."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"size": _size, "figure": _figure, "rate": _rate, "percent": _percent, "visible": _visible}
    environment.globals |= {
        "bars": histogram_bars,
        "layer_bars": layer_bars,
        "worst_layers": worst_layers,
        "pieces": pieces,
        "precisions": PRECISIONS,
        "percent": _percent,
        "figure": _figure,
    }
    template = environment.from_string(files("mcv_calibration").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    thumbnails = [[thumbnail(image) for image in sample.images] for sample in samples[:_SHOWN]]
    return template.render(report=report, thumbnails=thumbnails, graphs=_graphs)


def thumbnail(image: object) -> str:
    """A picture as a small `data:` URI."""
    picture = open_picture(image)  # type: ignore[arg-type]  # a sample's pictures can be opened
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def pieces(reference: str, answer: str) -> list[Piece]:
    """An answer cut where it leaves the reference's and where it comes back, word by word."""
    theirs, ours = _WORDS.findall(reference), _WORDS.findall(answer)
    found = []
    for kind, _, _, first, last in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if first < last:
            found.append(Piece("".join(ours[first:last]), kind == "equal"))
    return found


def histogram_bars(histogram: Histogram) -> list[Bar]:
    """One bar for each bin, as high as its share of the fullest."""
    most, total = max(histogram.counts) or 1, sum(histogram.counts) or 1
    edges = [math.inf if edge is None else edge for edge in histogram.edges]
    return [
        Bar(count / most, f"{low:g}", f"{low:g} to {high:g}: {count} ({count / total:.1%})")
        for count, low, high in zip(histogram.counts, edges[:-1], edges[1:], strict=True)
    ]


def layer_bars(layers: Sequence[LayerError]) -> list[Bar]:
    """One bar for each layer, in decibels."""
    return [Bar(*_height(layer), f"{layer.path} ({layer.precision}): {_describe(layer)}", layer.precision) for layer in layers]


def _height(layer: LayerError) -> tuple[float, str]:
    if layer.relative is None:
        return 0.0, "pruned"
    decibels = _FULL_DB if layer.sqnr_db is None else layer.sqnr_db
    return min(max(decibels / _FULL_DB, 0.02), 1.0), layer.path


def _describe(layer: LayerError) -> str:
    if layer.relative is None:
        return "pruned to another width"
    return "no error" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB, relative error {layer.relative:.2%}"


def _graphs(layers: Sequence[LayerError]) -> Iterator[tuple[str, list[LayerError]]]:
    for name in dict.fromkeys(layer.graph for layer in layers):
        yield name, [layer for layer in layers if layer.graph == name]


def _size(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def _figure(value: float | None, unit: str = "") -> str:
    """Three digits; nothing where nothing is known."""
    return "–" if value is None else f"{value:.3g}{unit}" if value else f"0{unit}"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _visible(text: str) -> str:
    """With signs in the place of control characters and halves of surrogate pairs, which no page may hold."""
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    code = ord(character)
    if code < 32 and character not in "\n\t":
        return chr(0x2400 + code)
    return "\ufffd" if code == 127 or 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE else character
