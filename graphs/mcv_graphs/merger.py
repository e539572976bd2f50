"""The merger: four neighbouring patches of the tower become one visual token of the language model: the graph `merger`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs.folds import behind_norm
from mcv_graphs.layers import FeedForward, LayerNorm, Linear

MERGED = 4
"""Patches of a visual token."""


class Merger(nn.Module):
    """Norm, and an MLP over the patches side by side; its GELU is the exact one, the tower's is not."""

    folds: ClassVar = (behind_norm("pre_norm", "linear_1"),)
    FFN: ClassVar[FeedForward] = (("linear_1",), "linear_2")

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        width = MERGED * vision_size
        self.pre_norm = LayerNorm(width, eps=1e-6)
        self.linear_1 = Linear(width, width)
        self.linear_2 = Linear(width, hidden_size)

    def forward(self, vision_hidden: Tensor) -> Tensor:
        """[S, N, 4, vision_size] -> [S, N, hidden]."""
        return self.linear_2(ops.gelu(self.linear_1(self.pre_norm(vision_hidden.flatten(2)))))
