"""The inputs of a module's linear layers: which layers read the same one, and whether a norm makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from mcv_graphs.layers import Folds, Linear


@dataclass(frozen=True, slots=True)
class LayerInput:
    """`layers` all read this input. `folded`: a norm makes it for them alone, so factors can go into the norm's weight."""

    layers: tuple[str, ...]
    folded: bool = False

    @property
    def name(self) -> str:
        """The first layer stands for all."""
        return self.layers[0]


def layer_inputs(module: nn.Module) -> tuple[LayerInput, ...]:
    """Of every quantizable linear layer, in the module's order; a block's `FOLDS` say which layers follow a norm."""
    linears = ((path, child) for path, child in module.named_modules() if isinstance(child, Linear))
    together: dict[str, LayerInput] = {}
    for path, block in module.named_modules():
        for _, names in cast(Folds, getattr(block, "FOLDS", ())):
            layers = tuple(f"{path}.{name}" if path else name for name in names)
            together |= dict.fromkeys(layers, LayerInput(layers, folded=True))
    found = (together.get(path, LayerInput((path,))) for path, layer in linears if layer.quantizable)
    return tuple(dict.fromkeys(found))
