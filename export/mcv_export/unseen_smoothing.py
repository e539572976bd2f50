"""Smoothing without samples: what weights alone say about the size of each channel that a layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from mcv_calibration.formats import layer_formats
from mcv_calibration.measured import Measured
from mcv_calibration.recipe import GraphRecipe
from mcv_calibration.smoothing import unseen_factors
from mcv_calibration.target import Target
from mcv_export.checkpoint import Checkpoint
from mcv_export.plan import GraphPlan
from mcv_export.sources import Source, resolve
from mcv_export.storage import Storage
from mcv_graphs.folds import Fold, folds

_WORTH_A_PRODUCT = 4.0
"""The largest factor over the smallest, from which on a layer's input is multiplied where no weight can take the factors."""


def smoothed_unseen(
    graph: GraphPlan,
    checkpoint: Checkpoint,
    recipe: GraphRecipe,
    target: Target,
    measured: Measured,
    pool: Executor | None = None,
) -> Measured:
    """`measured`, with factors for the quantized layers that samples need not have seen.

    Without them, a channel that a norm or a linear enlarges, and whose weights are small in return, loses those weights: they
    share their steps with others. Left as they are: layers of static ranges, which hold for what was measured, and tied ones,
    whose weight is another's too.
    """
    if not recipe.smoothing:
        return measured
    with torch.device("meta"):
        module = graph.module()
    formats = layer_formats(module, recipe, target)
    tied = {*graph.tied, *graph.tied.values()}
    known = [*folds(module), *(Fold(maker="", readers=(path,), free=False) for path in graph.input_norms)]
    weights = _Weights(graph, checkpoint, resolve(graph, checkpoint, Storage(measured=measured)), known, pool)
    smoothing = dict(measured.smoothing)
    for fold in known:
        kinds = [formats[layer] for layer in fold.readers if layer in formats]
        if not tied.isdisjoint(fold.readers) or not any(kind.quantized for kind in kinds) or any(kind.static for kind in kinds):
            continue
        if any(f"{layer}.weight" not in weights.sources for layer in fold.readers):
            continue
        energy = sum((weights.columns(layer) for layer in fold.readers), np.zeros(1))
        factors = unseen_factors(weights.typical(fold), energy, alpha=recipe.smoothing, shared=fold.channels)
        if fold.free or factors.max() >= _WORTH_A_PRODUCT * factors.min():
            smoothing |= dict.fromkeys(fold.readers, factors)
    return replace(measured, smoothing=smoothing)


@dataclass(slots=True)
class _Weights:
    """What the weights of one graph say, each read once."""

    graph: GraphPlan
    checkpoint: Checkpoint
    sources: Mapping[str, Source]
    folds: list[Fold]
    pool: Executor | None
    _seen: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=dict)

    def typical(self, fold: Fold) -> NDArray[np.float64]:
        """Root mean square of each channel that the fold's readers read, a norm's own output taken for 1 before its weight."""
        if fold.maker:
            found = self._made(fold.maker)
        else:
            norm = self.graph.input_norms[fold.readers[0]]
            found = np.hypot(self._vector(f"{norm}.weight"), self._vector(f"{norm}.bias"))
        if fold.channels is not None:
            found = found[np.array(fold.channels)]
        for gate in fold.gates:
            found = found * self._made(gate)
        return np.hypot(found, fold.added)

    def columns(self, path: str) -> NDArray[np.float64]:
        """Energy of each column of a linear's weight: [in]."""
        return self._look(path)[1]

    def _made(self, path: str) -> NDArray[np.float64]:
        """Root mean square of each channel of what a norm, a linear or a vector of weights gives."""
        if path in self.sources:
            return np.abs(self.sources[path].all().ravel().astype(np.float64))
        bias = self.sources.get(f"{path}.bias")
        of_bias = 0.0 if bias is None else bias.all().ravel().astype(np.float64)
        if self.sources[f"{path}.weight"].shape[1] == 1:
            return np.hypot(self.sources[f"{path}.weight"].all().ravel().astype(np.float64), of_bias)
        return np.hypot(self._look(path)[0], of_bias)

    def _look(self, path: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of a linear's weight: root mean square of what each row gives of its input, and the energy of each column."""
        if path not in self._seen:
            source = self.sources[f"{path}.weight"]
            fold = next((fold for fold in self.folds if path in fold.readers), None)
            typical = np.ones(source.shape[1]) if fold is None else self.typical(fold)
            looks = (self.pool.map if self.pool else map)(partial(_energies, source, typical), source.spans())
            rows, columns = zip(*looks, strict=True)
            self._seen[path] = np.sqrt(np.concatenate(rows)), np.sum(columns, 0)
        return self._seen[path]

    def _vector(self, name: str) -> NDArray[np.float64]:
        tensor = self.checkpoint.tensor(name)
        return tensor.rows(0, tensor.shape[0]).ravel().astype(np.float64)


def _energies(
    source: Source, typical: NDArray[np.float64], span: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of rows of a weight: what each gives of an input of these sizes, squared, and the energy of each column.

    Sums of numpy's own, not of a BLAS, whose order depends on how many threads it has.
    """
    squares = source.rows(*span)
    with np.errstate(over="ignore"):  # a factor that is no number is refused where it is used
        np.square(squares, out=squares)
        rows = np.einsum("nk,k->n", squares, np.square(typical).astype(np.float32))
        return rows.astype(np.float64), squares.sum(0).astype(np.float64)
