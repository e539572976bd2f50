"""What each block of a bundle's graph costs by itself, put into the checkpoint's graph in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mcv_calibration.contender import Call
from mcv_calibration.formats import layer_formats
from mcv_calibration.recipe import Recipe
from mcv_calibration.sensitivity import GraphBlocks, sensitivities
from mcv_export.oracle import TorchSession
from mcv_export.plan import GraphPlan
from mcv_export.stored import stored_module
from mcv_runtime.bundle.folder import Bundle


def block_errors(
    bundle: Bundle,
    graph: GraphPlan,
    session: TorchSession,
    calls: Sequence[Call],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> GraphBlocks:
    """`session` runs the graph in float, `calls` are some of its calls. Blocks in float are left out."""
    recipe = Recipe.from_data(bundle.manifest.quantization)
    with torch.device("meta"):
        formats = layer_formats(graph.module(), recipe.graphs[graph.shares or graph.name], recipe.target)
    quantized = stored_module(graph, formats, bundle.graph(graph.name))
    return sensitivities(graph.name, session, session.module, quantized, [call.inputs for call in calls], advance)
