"""Embeddings and heads whose outliers would bury the rest in 4 bits, told from their weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mcv_calibration.precisions import PRECISIONS, Precision
from mcv_calibration.recipe import Recipe
from mcv_export.checkpoint import Checkpoint
from mcv_export.plan import GraphPlan, ModelPlan
from mcv_export.sources import Source, resolve

EMBEDDING, HEAD = "embed_tokens", "lm_head"
HIGHER: Precision = "q8"
_STEPS = 15
LARGEST_ERROR = 0.3
"""What rounding may cost a channel of the embedding, or a row of the head, of the median one's size: about 0.1 is usual."""


def screened(plan: ModelPlan, checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe, with 8 bits for tables that 4 bits would spoil, unless it names them itself.

    A channel of the residual sum that is large in every token takes the levels from its neighbours in the embedding, where
    nothing can fold it away; a few huge rows of the head are rounded so coarsely that they win over the right token.
    """
    graphs = dict(recipe.graphs)
    for graph in plan.graphs:
        own = graphs.get(graph.name)
        if own is None or graph.shares or "q4" not in own.precisions:
            continue
        sources = resolve(graph, checkpoint)
        raised = set()
        for path, errors in ((EMBEDDING, _of_columns), (HEAD, _of_rows)):
            table = sources.get(f"{path}.weight")
            if table is None or path in own.layers or own.precision_of(path) != "q4":
                continue
            if errors(table, own.block_size or PRECISIONS["q4"].usual_block(table.shape[1])) > LARGEST_ERROR:
                raised.add(path)
        if raised and _tied(graph):
            raised = {EMBEDDING, HEAD}  # one table serves as both
        graphs[graph.name] = replace(own, layers={**dict.fromkeys(sorted(raised), HIGHER), **own.layers})
    return replace(recipe, graphs=graphs)


def _tied(graph: GraphPlan) -> bool:
    return {HEAD, EMBEDDING} <= {*graph.tied, *graph.tied.values()}


def _of_columns(source: Source, block_size: int) -> float:
    """The largest error of a column, of the median column's size."""
    noise, energy = np.zeros(source.shape[1]), np.zeros(source.shape[1])
    for rows_NK, steps_NB in _stepped(source, block_size):
        noise += np.repeat(np.square(steps_NB).sum(0) / 12, block_size)[: source.shape[1]]
        energy += np.square(rows_NK, dtype=np.float64).sum(0)
    return _largest(noise, energy)


def _of_rows(source: Source, block_size: int) -> float:
    """The largest error of a row, of the median row's size."""
    noise, energy = [], []
    for rows_NK, steps_NB in _stepped(source, block_size):
        noise.append(np.square(steps_NB).sum(1) * block_size / 12)
        energy.append(np.square(rows_NK, dtype=np.float64).sum(1))
    return _largest(np.concatenate(noise), np.concatenate(energy))


def _largest(noise: NDArray[np.float64], energy: NDArray[np.float64]) -> float:
    typical = float(np.median(energy))
    return float(np.sqrt(noise.max() / typical)) if typical else 0.0


def _stepped(source: Source, block_size: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """Rows [n, K], and the steps of their blocks [n, blocks]."""
    missing = -source.shape[1] % block_size
    for rows_NK in source.pieces():
        blocks = np.pad(rows_NK, ((0, 0), (0, missing))).reshape(len(rows_NK), -1, block_size)
        yield rows_NK, (np.maximum(blocks.max(2), 0) - np.minimum(blocks.min(2), 0)).astype(np.float64) / _STEPS
