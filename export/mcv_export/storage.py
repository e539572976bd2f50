"""How the weights of one graph are stored: the format of each layer, and what calibration measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mcv_calibration.measured import NOTHING, Measured
from mcv_calibration.recipe import Method
from mcv_graphs.folds import folds
from mcv_graphs.formats import LayerFormat
from mcv_graphs.layers import Embedding, FeedForward, Linear, set_formats
from mcv_runtime.errors import OptionError

if TYPE_CHECKING:
    from mcv_export.plan import GraphPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """`method` is how blocks are found that `measured` does not hold. The default is a graph in float."""

    formats: Mapping[str, LayerFormat] = field(default_factory=dict)
    measured: Measured = NOTHING
    method: Method | None = None

    def module(self, plan: GraphPlan) -> nn.Module:
        """The plan's module with its layers in these formats, without the channels that are not kept."""
        module = plan.module().eval().requires_grad_(False)
        for path, channels in self.measured.kept.items():
            if plan.shares and not _has(module, path):
                continue
            inner, outer = feed_forward(module, path)
            for layer in inner:
                cast(Linear, module.get_submodule(layer)).resize(out_features=len(channels))
            cast(Linear, module.get_submodule(outer)).resize(in_features=len(channels))
        folded = {layer for fold in folds(module) if fold.free for layer in fold.readers}
        set_formats(module, {path: self._smoothed(path, kind, path in folded) for path, kind in self.formats.items()})
        return module.requires_grad_(False)

    def _smoothed(self, path: str, kind: LayerFormat, folded: bool) -> LayerFormat:
        if folded or path not in self.measured.smoothing:
            return kind
        if not kind.quantized:
            raise OptionError(f"{path} is in float, and nothing before it takes factors: it cannot be smoothed")
        return replace(kind, smoothed=True)

    def twins(self, plan: GraphPlan, module: nn.Module) -> dict[str, str]:
        """The tensors of tied layers whose weight is another's byte for byte, each with that other."""
        twins: dict[str, str] = {}
        for path, other in plan.tied.items():
            layer, twin = (cast("Linear | Embedding", module.get_submodule(name)) for name in (path, other))
            touched = self.measured.blocks.keys() | self.measured.smoothing.keys()
            if layer.format == twin.format and not touched & {path, other}:
                held = dict(layer.named_parameters()) | dict(layer.named_buffers())
                twins |= {f"{path}.{leaf}": f"{other}.{leaf}" for leaf in held if leaf != "bias"}
        return twins


IN_FLOAT = Storage()


def feed_forward(module: nn.Module, path: str) -> tuple[tuple[str, ...], str]:
    """The paths of a block's `FFN`; raises `OptionError` where it has none."""
    block = module.get_submodule(path) if _has(module, path) else None
    if block is None or not hasattr(block, "FFN"):
        raise OptionError(f"{path or 'the graph itself'} has no feed-forward channels to leave out")
    inner, outer = cast(FeedForward, block.FFN)
    return tuple(join(path, name) for name in inner), join(path, outer)


def common_factors(measured: Measured, layers: tuple[str, ...]) -> NDArray[np.float32] | None:
    """The one smoothing of layers that read the same channels; those without any get the others'."""
    found = [measured.smoothing[layer] for layer in layers if layer in measured.smoothing]
    if not found:
        return None
    if any(not np.array_equal(found[0], other) for other in found[1:]):
        raise OptionError(f"{' and '.join(layers)} read the same channels, but their smoothing differs")
    return found[0]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has(module: nn.Module, path: str) -> bool:
    return any(path == name for name, _ in module.named_modules())
