"""From a recipe to the format of each layer of a graph."""

from __future__ import annotations

from torch import nn

from mcv_calibration.precisions import PRECISIONS
from mcv_calibration.recipe import GraphRecipe
from mcv_calibration.target import Target
from mcv_graphs.formats import LayerFormat
from mcv_graphs.layers import Embedding, Linear


def layer_formats(module: nn.Module, recipe: GraphRecipe, target: Target) -> dict[str, LayerFormat]:
    """The format of every layer that may have one, by path."""
    formats: dict[str, LayerFormat] = {}
    layers = {
        path: layer for path, layer in module.named_modules() if isinstance(layer, Linear | Embedding) and layer.quantizable
    }
    tables = [layer.width for layer in layers.values() if isinstance(layer, Embedding)]
    for path, layer in layers.items():
        spec = PRECISIONS[recipe.precision_of(path)]
        if isinstance(layer, Embedding) and spec.table:
            spec = PRECISIONS[spec.table]
        formats[path] = spec.layer(recipe.block_size or spec.usual_block(*tables), target)
    return formats
