"""From a recipe to the format of each layer of a graph."""

from __future__ import annotations

from torch import nn

from mcv_calibration.recipe import INT8, GraphRecipe, Precision
from mcv_calibration.target import Target, int8_format
from mcv_graphs.formats import FLOAT32, Activations, LayerFormat, WeightFormat
from mcv_graphs.layers import Embedding, Linear

BITS: dict[Precision, int] = {"q8": 8, "q4": 4}
ACTIVATIONS: dict[Precision, Activations] = {"int8-static": "static", "int8-dynamic": "dynamic", "int8-token": "token"}


def layer_formats(module: nn.Module, recipe: GraphRecipe, target: Target) -> dict[str, LayerFormat]:
    """The format of every layer that may have one, by path. An embedding in int8 is one in q8: it multiplies nothing."""
    formats: dict[str, LayerFormat] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, Linear | Embedding) and layer.quantizable:
            precision = recipe.precision_of(path)
            if isinstance(layer, Embedding) and precision in INT8:
                precision = "q8"
            formats[path] = _format(precision, recipe.block_size, target)
    return formats


def _format(precision: Precision, block_size: int, target: Target) -> LayerFormat:
    if precision in BITS:
        return WeightFormat(bits=BITS[precision], block_size=block_size)
    if precision == "fp32":
        return FLOAT32
    return int8_format(target, ACTIVATIONS[precision])
