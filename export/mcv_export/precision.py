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
    "merger": "q8",
    "decoder_with_past": "q4",
}
"""The fastest that keep what the model can do, whatever its outliers, and need no samples (results/surgery.json)."""
_DEFAULT_LAYERS: Mapping[GraphName, Mapping[str, Precision]] = {
    "resampler": dict.fromkeys(("v_proj", "out_proj", "proj"), "q8"),
}
"""What differs in a graph whose precision nobody named. In 8-bit products, what visual tokens are sums of makes nearly half of
their error; in blocks it takes a fiftieth of a tower's time more."""
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
    `prune_ffn` is about the tower and the language model. What is None has the default of `GraphRecipe`.
    """

    precision: Precision | None = None
    graphs: Mapping[GraphName, Precision] = field(default_factory=dict)
    target: str | None = None
    block_size: int | None = None
    method: Method | None = None
    ranges: Ranges | None = None
    smoothing: float | None = None
    prune_ffn: float | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of `GraphRecipe`, by graph or, for all that do not say otherwise, by `*`; what the other fields say goes over them."""

    def recipe(self) -> Recipe:
        """The recipe, by graph or role; raises `OptionError`."""
        names = [*DEFAULT, *(cast(GraphName, name) for name in self.settings if name not in (*DEFAULT, EVERY))]
        graphs = {name: GraphRecipe.from_data(self._settings(name), f"recipe: {name}") for name in names}
        return Recipe(target=chosen(self.target), graphs=graphs)

    def _settings(self, name: GraphName) -> dict[str, Any]:
        """What `GraphRecipe` is made of."""
        role = ROLES.get(name, name)
        asked = self.precision
        if asked in _FOR_DECODERS and role != "decoder_with_past":
            asked = None
        said: dict[str, Any] = {}
        for part in (EVERY, role, name):
            said |= self.settings.get(part, {})
        fields = {
            "precision": self.graphs.get(name, self.graphs.get(role, asked)),
            "block_size": self.block_size,
            "method": self.method,
            "ranges": self.ranges,
            "smoothing": self.smoothing,
            "prune_ffn": None if role == "resampler" else self.prune_ffn,
        }
        said |= {key: value for key, value in fields.items() if value is not None}
        if "precision" not in said:
            said = {"precision": DEFAULT.get(name, DEFAULT[role]), "layers": _DEFAULT_LAYERS.get(name, {}), **said}
        return said
