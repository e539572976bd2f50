"""From a recipe to the format of each layer of a graph."""

from __future__ import annotations

from torch import nn

from mcv_calibration.precisions import PRECISIONS
from mcv_calibration.recipe import GraphRecipe, require_known
from mcv_calibration.target import Target
from mcv_graphs.formats import LayerFormat
from mcv_graphs.layers import Embedding, Linear


def layer_formats(module: nn.Module, recipe: GraphRecipe, target: Target) -> dict[str, LayerFormat]:
    """The format of every layer that may have one, by path."""
    formats: dict[str, LayerFormat] = {}
    layers = _layers(module)
    tables = [layer.width for layer in layers.values() if isinstance(layer, Embedding)]
    for path, layer in layers.items():
        spec = PRECISIONS[recipe.precision_of(path)]
        if isinstance(layer, Embedding) and spec.table:
            spec = PRECISIONS[spec.table]
        formats[path] = spec.layer(recipe.block_size or spec.usual_block(*tables), target)
    return formats


def require_layers(module: nn.Module, recipe: GraphRecipe, where: str) -> None:
    """Raise `OptionError` where the recipe names layers that the graph has not."""
    paths = [path.split(".") for path in _layers(module)]
    known = dict.fromkeys(".".join(path[:end]) for path in paths for end in range(1, len(path) + 1))
    require_known(recipe.layers, list(known), where)


def _layers(module: nn.Module) -> dict[str, Linear | Embedding]:
    """Those that may have a format, by path."""
    layers = ((path, layer) for path, layer in module.named_modules() if isinstance(layer, Linear | Embedding))
    return {path: layer for path, layer in layers if layer.quantizable}
