"""The precision of each graph: its default, and recipes made of a few wishes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from mcv_calibration.precisions import Precision
from mcv_calibration.recipe import GraphRecipe, Method, Ranges, Recipe
from mcv_calibration.target import chosen
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.errors import OptionError

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

EVERY = "*"
"""In the place of a graph's name: settings of all that do not say otherwise."""

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
    target: str | None = None
    block_size: int | None = None
    method: Method | None = None
    ranges: Ranges | None = None
    smoothing: float | None = None
    prune_ffn: float | None = None
    mixed: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of `GraphRecipe`, by graph or, for all that do not say otherwise, by `*`; what the other fields say goes over them."""

    def recipe(self) -> Recipe:
        """The recipe, by role; raises `OptionError`."""
        names = [*DEFAULT, *(cast(GraphName, name) for name in self.settings if name not in (*DEFAULT, EVERY))]
        graphs = {name: GraphRecipe.from_data(self._settings(name), f"recipe: {name}") for name in names}
        if self.mixed and not any(graph.layers for graph in graphs.values()):
            raise OptionError("mixed precision is about a q4 decoder; leave it out, or make the decoder q4")
        return Recipe(target=chosen(self.target), graphs=graphs)

    def _settings(self, name: GraphName) -> dict[str, Any]:
        """What `GraphRecipe` is made of."""
        role = ROLES.get(name, name)
        asked = self.precision
        if asked in _FOR_DECODERS and role != "decoder_with_past":
            asked = None
        said = {"precision": DEFAULT[role], **self.settings.get(EVERY, {}), **self.settings.get(name, {})}
        fields = {
            "precision": self.graphs.get(name, self.graphs.get(role, asked)),
            "block_size": self.block_size,
            "method": self.method,
            "ranges": self.ranges,
            "smoothing": self.smoothing,
            "prune_ffn": None if role == "resampler" else self.prune_ffn,
        }
        said |= {key: value for key, value in fields.items() if value is not None}
        if self.mixed and role == "decoder_with_past" and said["precision"] == "q4":
            said["layers"] = _MIXED
        return said
