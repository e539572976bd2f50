"""A graph's module in plain torch with the checkpoint's weights, at the memory of one weight: what graphs are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mcv_calibration.measured import NOTHING, Measured
from mcv_calibration.recipe import Method
from mcv_export.checkpoint import Checkpoint
from mcv_export.layer_weights import constants, layer_rows, layer_spans
from mcv_export.plan import GraphPlan
from mcv_export.sources import Source, resolve
from mcv_export.storage import Storage
from mcv_graphs.formats import LayerFormat
from mcv_graphs.layers import Embedding, Linear

RESIDENT = 256 << 20
"""Bytes of weights that a module may keep: small models need not read theirs again and again."""


def eager_module(
    plan: GraphPlan,
    checkpoint: Checkpoint,
    *,
    formats: Mapping[str, LayerFormat] | None = None,
    measured: Measured = NOTHING,
    method: Method | None = None,
    resident: int = RESIDENT,
) -> nn.Module:
    """The module, by default in float32; its large weights are read and quantized when they are used and dropped afterwards.

    Quantized layers hold what the weight writer would write, and round as the operators do. Up to `resident` bytes of weights
    stay once they were read. Raises `CheckpointError`, and `OptionError` where something that a format needs is not measured.
    """
    storage = Storage(formats=formats or {}, measured=measured, method=method)
    with torch.device("meta"):
        module = storage.module(plan)
    sources = resolve(plan, checkpoint, storage)
    budget = Budget(resident)
    for name in [*sources, *plan.computed]:
        owner, _, leaf = name.rpartition(".")
        child = module.get_submodule(owner)
        if name in plan.computed:
            child.register_buffer(leaf, torch.from_numpy(plan.computed[name]()), persistent=False)
        elif leaf == "weight" and isinstance(child, Linear | Embedding) and child.quantizable:
            _stream(child, owner, sources[name], storage, budget)
        else:
            value = torch.from_numpy(np.ascontiguousarray(sources[name].all()))
            transposed = leaf == "weight" and isinstance(child, Linear)
            shape = child.get_parameter(leaf).shape
            setattr(child, leaf, _parameter((value.T if transposed else value).reshape(shape)))
    return module


@dataclass(slots=True)
class Budget:
    """How many bytes of weights may still stay."""

    left: int

    def takes(self, size: int) -> bool:
        taken = size <= self.left
        self.left -= size if taken else 0
        return taken


def _stream(layer: Linear | Embedding, path: str, source: Source, storage: Storage, budget: Budget) -> None:
    """Have the layer's weight there during its `forward`, and longer where the budget allows."""
    held = {name: getattr(layer, name) for name in _held(layer)}
    for name, value in constants(layer.format, path, storage).items():
        held[name] = torch.from_numpy(value)
        setattr(layer, name, held[name])
    stays = budget.takes(sum(tensor.numel() * tensor.element_size() for tensor in held.values()))
    there = False

    def fill(layer: nn.Module, _: object) -> None:
        nonlocal there
        if not there:
            assert isinstance(layer, Linear | Embedding)
            for name, value in _tensors(layer, path, source, storage).items():
                tensor = torch.from_numpy(value)
                setattr(layer, name, _parameter(tensor) if name in layer._parameters else tensor)
            there = True

    def drop(layer: nn.Module, _: object, __: object) -> None:
        nonlocal there
        if not stays:
            for name, value in held.items():
                setattr(layer, name, value)
            there = False

    layer.register_forward_pre_hook(fill)
    layer.register_forward_hook(drop)


def _held(layer: Linear | Embedding) -> list[str]:
    """The tensors that the layer's weight consists of."""
    named = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return [name for name, _ in named if name != "bias"]


def _tensors(layer: Linear | Embedding, path: str, source: Source, storage: Storage) -> dict[str, NDArray[Any]]:
    """The weight in the layer's format."""
    kind = layer.format
    pieces = [layer_rows(kind, path, source, storage, *span) for span in layer_spans(kind, path, source, storage)]
    tensors = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    if isinstance(layer, Linear):
        return {name: rows.T if name in kind.columns else rows for name, rows in tensors.items()}
    return {name: rows.reshape(layer.rows, -1) for name, rows in tensors.items()}


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
