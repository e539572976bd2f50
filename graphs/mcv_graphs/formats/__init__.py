"""How layers hold their weights, and in what numbers they compute: a file for each way."""

from mcv_graphs.formats.blocks import WeightFormat
from mcv_graphs.formats.float32 import FLOAT32, FloatFormat
from mcv_graphs.formats.int8 import Activations, Int8Format
from mcv_graphs.formats.layer_format import Blocks, InputRange, LayerFormat, Rounding, Tensors

__all__ = [
    "FLOAT32",
    "Activations",
    "Blocks",
    "FloatFormat",
    "InputRange",
    "Int8Format",
    "LayerFormat",
    "Rounding",
    "Tensors",
    "WeightFormat",
]
