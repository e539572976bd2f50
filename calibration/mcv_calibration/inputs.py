"""The inputs of a module's linear layers: which layers read the same one, and whether factors can move out of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mcv_graphs.folds import folds
from mcv_graphs.layers import Linear


@dataclass(frozen=True, slots=True)
class LayerInput:
    """`layers` all read this input. `folded`: what makes it makes it for them alone, so factors can go into its weight.

    `channels`: columns with the same number are the same channel there, and can have one factor only.
    """

    layers: tuple[str, ...]
    folded: bool = False
    channels: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The first layer stands for all."""
        return self.layers[0]


def layer_inputs(module: nn.Module) -> tuple[LayerInput, ...]:
    """Of every quantizable linear layer, in the module's order; its blocks' folds say where factors can go."""
    linears = ((path, child) for path, child in module.named_modules() if isinstance(child, Linear))
    together: dict[str, LayerInput] = {}
    for fold in folds(module):
        if fold.free:
            together |= dict.fromkeys(fold.readers, LayerInput(fold.readers, folded=True, channels=fold.channels))
    found = (together.get(path, LayerInput((path,))) for path, layer in linears if layer.quantizable)
    return tuple(dict.fromkeys(found))
