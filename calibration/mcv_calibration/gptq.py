"""GPTQ: rounding one input channel after the other, each making up for the errors of those before it.

After Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
With the error e of a row of the weight and H = L L^T the second moments of its inputs, the error of the layer's output is
|e L|^2. Published, the method works on a Cholesky factor of H's inverse; written with L itself it takes one factorisation
instead of three and half the memory, and runs from the last channel to the first: component j of e L has errors of channels
i >= j alone, and those done before are all that channel j has to make up for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mcv_calibration.blocks import BlockRows, Blocks
from mcv_calibration.grids import Floats, Grid
from mcv_calibration.k_quant import k_quant
from mcv_graphs.layers import WeightFormat
from mcv_runtime.errors import OptionError

_PANEL = 128
"""Channels whose debts to all panels before are worked out in one product, 2.5 times faster than block by block."""
_MOST_DAMPING = 1.0
"""Moments that are not positive definite even so are no moments: what is left of them is each channel's own."""


def gptq(rows_NK: Floats, hessian_KK: Floats, weights: WeightFormat, damping: float = 0.01) -> Blocks:
    """Quantize [N, K] so that its products with inputs of second moments [K, K] (of any scale) change little.

    `damping` is added to the diagonal as a share of its mean, and raised where that is not enough to factorise it. In
    memory are two more of the second moments and two of the weight. Raises `OptionError` for moments of another
    width, or which are no numbers.
    """
    rows, width = rows_NK.shape
    if hessian_KK.shape != (width, width):
        raise OptionError(f"second moments {list(hessian_KK.shape)} for a weight {width} wide; measure this very layer")
    factor = _factor(hessian_KK, damping)
    weight = torch.from_numpy(np.ascontiguousarray(rows_NK.T))
    error = torch.zeros_like(weight)
    size = weights.block_size
    result = BlockRows(rows, width, weights)
    panel = max(_PANEL, size)
    for block in reversed(range(weights.blocks(width))):
        first, last = block * size, min((block + 1) * size, width)
        start, end = first // panel * panel, min((first // panel + 1) * panel, width)
        if last == end:
            owed = factor[end:, start:end].T @ error[end:]
        own = factor[first:last, first:last]
        inverse = torch.linalg.solve_triangular(own, torch.eye(last - first), upper=False)
        recent = torch.addmm(owed[first - start : last - start], factor[last:end, first:last].T, error[last:end])
        padded = np.zeros((size, rows), np.float32)
        padded[: last - first] = torch.addmm(weight[first:last], inverse.T, recent).numpy()
        # A channel's rounding error costs as much as no later channel can make up for: the square of its diagonal element.
        importance = np.zeros((size, 1), np.float32)
        importance[: last - first, 0] = own.diagonal().square().numpy()
        grid = k_quant(padded, weights, np.broadcast_to(importance, padded.shape))
        steps = _round(padded, inverse.numpy(), grid)
        error[first:last] = weight[first:last] - torch.from_numpy(grid.values(steps)[: last - first])
        result.put_block(block, steps, grid)
    return result.blocks()


def _round(values_SN: Floats, inverse: Floats, grid: Grid) -> Floats:
    """q of one block's values, from its last channel to its first; padding comes out as zero."""
    steps = np.empty_like(values_SN)
    steps[:] = grid.zeros
    for channel in reversed(range(len(inverse))):
        steps[channel] = grid.steps(values_SN[channel])
        wrong = values_SN[channel] - grid.values(steps[channel])
        made_up = inverse[channel, :channel, None] / inverse[channel, channel]
        values_SN[:channel] -= made_up * wrong
    return steps


def _factor(hessian_KK: Floats, damping: float) -> Tensor:
    """The lower Cholesky factor of the damped second moments."""
    damped = torch.from_numpy(np.array(hessian_KK, np.float32))
    diagonal = damped.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise OptionError("the second moments of a layer's inputs are no numbers; leave out the sample that causes it")
    dead = diagonal <= 0
    mean = 1.0 if bool(dead.all()) else float(diagonal[~dead].mean())
    # A channel that was never used is rounded to nearest: it neither makes up for others nor has them make up for it.
    damped[dead] = 0
    damped[:, dead] = 0
    diagonal[dead] = mean
    own = diagonal.clone()
    while damping <= _MOST_DAMPING:
        diagonal.copy_(own).add_(damping * mean)
        found = torch.linalg.cholesky_ex(damped)
        if not int(found.info):
            factor: Tensor = found.L
            return factor
        damping = max(10 * damping, 1e-3)
    return torch.diag(own.sqrt())
