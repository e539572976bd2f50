"""A graph's module in plain torch with the checkpoint's weights, at the memory of one weight: the oracle of `verify`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcv_export.checkpoint import Checkpoint
from mcv_export.plan import GraphPlan
from mcv_export.weights import Source, resolve
from mcv_graphs.layers import FLOAT32, Embedding, Linear


def eager_module(plan: GraphPlan, checkpoint: Checkpoint) -> nn.Module:
    """The float32 module, its large weights read from the checkpoint when they are used and dropped afterwards."""
    with torch.device("meta"):
        module = plan.module(FLOAT32).eval().requires_grad_(False)
    sources = resolve(plan, module, checkpoint)
    for name in [*sources, *plan.computed]:
        owner, _, leaf = name.rpartition(".")
        child = module.get_submodule(owner)
        if name in plan.computed:
            child.register_buffer(leaf, torch.from_numpy(plan.computed[name]()), persistent=False)
        elif leaf == "weight" and isinstance(child, Linear | Embedding):
            _stream(child, sources[name])
        else:
            shape = child.get_parameter(leaf).shape
            child.register_parameter(leaf, _parameter(_read(sources[name]).reshape(shape)))
    return module


def _stream(layer: Linear | Embedding, source: Source) -> None:
    """Have the layer's weight there during its `forward` only."""
    empty = layer.weight

    def fill(layer: nn.Module, _: object) -> None:
        weight = _read(source)
        layer.weight = _parameter(weight.T if isinstance(layer, Linear) else weight)

    def drop(layer: nn.Module, _: object, __: object) -> None:
        layer.weight = empty

    layer.register_forward_pre_hook(fill)
    layer.register_forward_hook(drop)


def _read(source: Source) -> Tensor:
    return torch.from_numpy(source.rows(0, source.shape[0]))


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
