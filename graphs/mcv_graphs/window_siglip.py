"""The SigLIP2 tower of the merger generation: after one of its layers, windows of 2 x 2 patches may be merged into one.

Patches come nested: those of one visual token stand together, window by window, row by row in each. Attention has no use for
the raster order (a patch's place is in its position id), so every merge is a reshape and the graph holds no index arithmetic.
"""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs.folds import Fold, behind_norm
from mcv_graphs.layers import Embedding, FeedForward, LayerNorm, Linear
from mcv_graphs.siglip import SiglipConfig, SiglipLayer

WINDOW = 4
"""Patches of a 2 x 2 window."""


class WindowSiglipTower(nn.Module):
    """A SigLIP tower that merges windows after layer `merge_after`, or never if that is None."""

    def __init__(self, config: SiglipConfig, merge_after: int | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.merge_after = merge_after
        # Patch and position embeddings stay in float: a fraction of a percent of the weights, and the input of everything.
        self.patch_embedding = Linear(3 * config.patch_size**2, width, quantizable=False)
        self.position_embedding = Embedding(config.position_table_side**2, width, quantizable=False)
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_layers))
        self.post_layernorm = LayerNorm(width, config.layer_norm_eps)
        if merge_after is not None:
            self.vit_merger = WindowMerger(config)

    def forward(self, pixel_values: Tensor, position_ids: Tensor) -> Tensor:
        """pixel_values [S, N, P, 3 * p * p], position_ids [S, N, P] -> [S, N, 4, hidden]: P patches of each visual token."""
        x = (self.patch_embedding(pixel_values) + self.position_embedding(position_ids)).flatten(1, 2)
        layers = cast(list[SiglipLayer], self.layers)
        normed = layers[0].layer_norm1(x)
        following = [layer.layer_norm1 for layer in layers[1:]] + [self.post_layernorm]
        for index, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
            normed, x = layer.layer_norm2.skip(x, layer.attention(normed))
            added = layer.mlp(normed)
            if index == self.merge_after:
                x, added = self.vit_merger(x, added)
            normed, x = next_norm.skip(x, added)
        return normed.unflatten(1, (-1, WINDOW))


class WindowMerger(nn.Module):
    """Attention inside each window, then an MLP from its four patches to one, added to their mean."""

    folds: ClassVar = (
        behind_norm("layer_norm1", "q_proj", "k_proj", "v_proj"),
        Fold(maker="v_proj", readers=("out_proj",)),
        behind_norm("pre_norm", "linear_1"),
    )
    FFN: ClassVar[FeedForward] = (("linear_1",), "linear_2")

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_heads
        self.layer_norm1 = LayerNorm(width, eps)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))
        self.pre_norm = LayerNorm(WINDOW * width, eps)
        self.linear_1 = Linear(WINDOW * width, WINDOW * config.intermediate_size)
        self.linear_2 = Linear(WINDOW * config.intermediate_size, width)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it, both [S, L, W] -> the same two, [S, L / 4, W]."""
        normed, x = self.layer_norm1.skip(x, skip)
        windows = normed.reshape(-1, WINDOW, normed.shape[-1])
        query, key, value = (project(windows) for project in (self.q_proj, self.k_proj, self.v_proj))
        attended = ops.multi_head_attention(query, key, value, self.num_heads)
        stacked = x.unflatten(1, (-1, WINDOW)).flatten(2)
        normed, total = self.pre_norm.skip(stacked, self.out_proj(attended).reshape(stacked.shape))
        mean = total.unflatten(-1, (WINDOW, -1)).mean(dim=-2)
        return mean, self.linear_2(ops.gelu_tanh(self.linear_1(normed)))
