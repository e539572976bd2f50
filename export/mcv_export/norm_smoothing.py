"""Smoothing without samples: what a norm's own weight and bias say about the channels that it gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mcv_calibration.formats import layer_formats
from mcv_calibration.measured import Measured
from mcv_calibration.recipe import GraphRecipe
from mcv_calibration.smoothing import factors_behind_norm
from mcv_calibration.target import Target
from mcv_export.checkpoint import Checkpoint
from mcv_export.plan import GraphPlan
from mcv_export.sources import resolve
from mcv_export.storage import Storage, folds
from mcv_graphs.formats import Int8Format, LayerFormat


def smoothed_by_norms(
    graph: GraphPlan, checkpoint: Checkpoint, recipe: GraphRecipe, target: Target, measured: Measured
) -> Measured:
    """`measured`, with factors for the quantized layers behind each norm that samples need not have seen.

    Without them, a channel that a norm enlarges, and whose weights are small in return, loses those weights: they share
    their steps with others. Left as they are: norms before a layer of static ranges, which hold for what was measured, and
    before a tied layer, whose weight is another's too.
    """
    if not recipe.smoothing:
        return measured
    with torch.device("meta"):
        module = graph.module()
    formats = layer_formats(module, recipe, target)
    sources = resolve(graph, checkpoint, Storage(measured=measured))
    tied = {*graph.tied, *graph.tied.values()}

    def rows(path: str) -> Iterator[NDArray[np.float32]]:
        return (chunk for _, chunk in sources[f"{path}.weight"].chunks())

    smoothing = dict(measured.smoothing)
    for norm, layers in folds(module):
        kinds = [formats[layer] for layer in layers if layer in formats]
        if tied.isdisjoint(layers) and any(kind.quantized for kind in kinds) and not any(map(_is_static, kinds)):
            gain, bias = (sources.get(f"{norm}.{name}") for name in ("weight", "bias"))
            assert gain is not None
            factors = factors_behind_norm(
                gain.all().ravel(), None if bias is None else bias.all().ravel(), layers, rows, alpha=recipe.smoothing
            )
            smoothing |= dict.fromkeys(layers, factors)
    return replace(measured, smoothing=smoothing)


def _is_static(kind: LayerFormat) -> bool:
    return isinstance(kind, Int8Format) and kind.activations == "static"
