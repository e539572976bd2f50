"""The precision of each graph: its default, what it adds to a file's name, and recipes made of a few wishes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcv_calibration.recipe import GraphRecipe, Method, Precision, Ranges, Recipe
from mcv_calibration.target import Target, chosen
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.errors import OptionError

SUFFIXES: dict[Precision, str] = {
    "fp32": "",
    "q8": "_q8",
    "q4": "_q4",
    "int8-static": "_int8",
    "int8-dynamic": "_int8_dynamic",
    "int8-token": "_int8_token",
}

DEFAULT: dict[GraphName, Precision] = {
    "vision_encoder": "int8-token",
    "resampler": "int8-token",
    "decoder_with_past": "q4",
}
"""The fastest that keep what the model can do, whatever its outliers, and need no samples (results/tiny-quality.json)."""
_FOR_DECODERS: frozenset[Precision] = frozenset(("q4",))
"""Other graphs have these where they are named alone: 4 bits cost a tower a fifth of what it gives, and make it no faster."""

ROLES: dict[GraphName, GraphName] = {
    "vision_encoder_16x": "vision_encoder",
    "vision_encoder_4x": "vision_encoder",
    "merger": "resampler",
}
"""Whose precision a graph has if it is not named itself."""

_MIXED: Mapping[str, Precision] = {"embed_tokens": "q8", "lm_head": "q8"}
"""Layers of a decoder that lose most by 4 bits for their size."""


def resolved(recipe: Recipe, graphs: Iterable[GraphName]) -> Recipe:
    """The recipe by the names that a model's graphs have; raises `OptionError` where it says nothing about one of them."""
    found: dict[GraphName, GraphRecipe] = {}
    for name in graphs:
        role = ROLES.get(name, name)
        if name not in recipe.graphs and role not in recipe.graphs:
            raise OptionError(f"the recipe says nothing about the graph {name}; add it")
        found[name] = recipe.graphs[name] if name in recipe.graphs else recipe.graphs[role]
    return Recipe(target=recipe.target, graphs=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """A recipe in few words: what a command line can say.

    `precision` is that of all graphs that `graphs` does not name, but q4, which is a decoder's: the others keep their default.
    `mixed`: a q4 decoder's embedding and head in q8. `prune_ffn` is about the tower and the language model. What is None has
    the default of `GraphRecipe`.
    """

    precision: Precision | None = None
    graphs: Mapping[GraphName, Precision] = field(default_factory=dict)
    target: Target | None = None
    block_size: int | None = None
    method: Method | None = None
    ranges: Ranges | None = None
    smoothing: float | None = None
    prune_ffn: float | None = None
    mixed: bool = False

    def recipe(self) -> Recipe:
        """The recipe, by role; raises `OptionError`."""
        graphs: dict[GraphName, GraphRecipe] = {}
        for name, default in DEFAULT.items():
            settings: dict[str, Any] = {
                "block_size": self.block_size,
                "method": self.method,
                "ranges": self.ranges,
                "smoothing": self.smoothing,
                "prune_ffn": None if name == "resampler" else self.prune_ffn,
            }
            asked = self.precision
            if asked is None or (asked in _FOR_DECODERS and name != "decoder_with_past"):
                asked = default
            precision = self.graphs.get(name, asked)
            layers = _MIXED if self.mixed and name == "decoder_with_past" and precision == "q4" else {}
            said = {key: value for key, value in settings.items() if value is not None}
            graphs[name] = GraphRecipe(precision=precision, layers=layers, **said)
        if self.mixed and not any(graph.layers for graph in graphs.values()):
            raise OptionError("mixed precision is about a q4 decoder; leave it out, or make the decoder q4")
        return Recipe(target=chosen(self.target), graphs=graphs)


def read_recipe(file: Path, wishes: Wishes) -> Recipe:
    """The recipe of a file, or of a bundle's `mcv.json`; raises `OptionError`, also where wishes say something else."""
    if wishes != Wishes():
        raise OptionError(f"{file} says how everything is quantized; leave out the options that say so too")
    try:
        return Recipe.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
