"""Which channels of a feed-forward block matter, and which a smaller block keeps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mcv_runtime.errors import OptionError


def ffn_importance(mean_square_K: NDArray[np.float32], down_NK: NDArray[np.float32]) -> NDArray[np.float32]:
    """What leaving each channel out would cost: the mean square of what it adds to the block's output, [K].

    `mean_square_K` is that of the down projection's inputs, `down_NK` its weight.
    """
    norms: NDArray[np.float32] = np.einsum("nk,nk->k", down_NK, down_NK)
    return mean_square_K * norms


def kept_channels(importance_K: NDArray[np.float32], fraction: float, multiple: int = 32) -> NDArray[np.int64]:
    """The channels that stay when `fraction` of them is pruned, the most important ones, ascending.

    Their number is rounded up to a multiple of `multiple`: kernels and quantization work on whole blocks of channels.
    Raises `OptionError` where rounding leaves nothing to prune.
    """
    width = len(importance_K)
    if not 0 <= fraction < 1:
        raise OptionError(f"prune_ffn={fraction}: choose a share from 0 up to, but not including, 1")
    if fraction == 0:
        return np.arange(width)
    # Less a little, so that 0.2 of 160 leaves 128 in spite of rounding in binary.
    kept = math.ceil((1 - fraction) * width / multiple - 1e-9) * multiple
    if kept >= width:
        raise OptionError(
            f"prune_ffn={fraction}: {width} channels are too few to prune in steps of {multiple}; prune more, or nothing"
        )
    order = np.argsort(-importance_K, kind="stable")
    return np.sort(order[:kept])
