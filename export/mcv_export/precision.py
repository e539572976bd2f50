"""The precision of each graph: its default, and what it adds to a file's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mcv_calibration.recipe import GraphRecipe, Precision, Recipe
from mcv_calibration.target import Target, this_machine
from mcv_runtime.errors import OptionError
from mcv_runtime.manifest import GraphName

SUFFIXES: dict[Precision, str] = {
    "fp32": "",
    "q8": "_q8",
    "q4": "_q4",
    "int8-static": "_int8",
    "int8-dynamic": "_int8_dynamic",
}

DEFAULT: dict[GraphName, Precision] = {"vision_encoder": "q8", "resampler": "q8", "decoder_with_past": "q4"}
"""4 bits lose too much of a vision tower and save little beside the decoder."""

ROLES: dict[GraphName, GraphName] = {
    "vision_encoder_16x": "vision_encoder",
    "vision_encoder_4x": "vision_encoder",
    "merger": "resampler",
}
"""Whose precision a graph has if it is not named itself."""


def recipe_of(
    precision: Precision | Mapping[GraphName, Precision], *, target: Target | None = None, block_size: int = 32
) -> Recipe:
    """The recipe of one precision for all graphs, or of one for each by name; graphs not named get the default."""
    names: dict[GraphName, Precision] = (
        dict.fromkeys(DEFAULT, precision) if isinstance(precision, str) else {**DEFAULT, **precision}
    )
    graphs = {name: GraphRecipe(precision=chosen, block_size=block_size) for name, chosen in names.items()}
    return Recipe(target=target or this_machine(), graphs=graphs)


def resolved(recipe: Recipe, graphs: Iterable[GraphName]) -> Recipe:
    """The recipe by the names that a model's graphs have; raises `OptionError` where it says nothing about one of them."""
    found: dict[GraphName, GraphRecipe] = {}
    for name in graphs:
        role = ROLES.get(name, name)
        if name not in recipe.graphs and role not in recipe.graphs:
            raise OptionError(f"the recipe says nothing about the graph {name}; add it")
        found[name] = recipe.graphs[name] if name in recipe.graphs else recipe.graphs[role]
    return Recipe(target=recipe.target, graphs=found)
