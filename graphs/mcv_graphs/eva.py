"""The EVA02-CLIP vision tower of OmniLMM, for pictures of one size: the graph `vision_encoder`.

Post-norm blocks (what a sublayer gives is normed before it is added), exact GELU, a class token that the output leaves out.
Structure: timm's eva02_enormous_patch14_clip_224.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs.folds import Fold
from mcv_graphs.layers import FeedForward, LayerNorm, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaConfig:
    """Sizes of a tower; a picture has `grid_side` squared patches."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    grid_side: int
    layer_norm_eps: float = 1e-6


class EvaTower(nn.Module):
    """Patches of whole pictures to features."""

    class_token: Tensor
    positions: Tensor

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width, patches = config.hidden_size, config.grid_side**2
        self.patch_embedding = Linear(3 * config.patch_size**2, width, quantizable=False)
        self.register_buffer("class_token", torch.empty(1, width), persistent=False)  # its position added
        self.register_buffer("positions", torch.empty(patches, width), persistent=False)  # resized to the grid
        self.layers = nn.ModuleList(EvaLayer(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(width, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [S, L, 3 * P * P] (a patch flattened in C, P, P order), L = grid_side ** 2 -> [S, L, hidden]."""
        patches = self.patch_embedding(pixel_values) + self.positions
        first = self.class_token.unsqueeze(0).expand(pixel_values.shape[0], -1, -1)
        x = torch.cat((first, patches), dim=1)
        for layer in cast("list[EvaLayer]", self.layers):
            x = layer(x)
        return self.norm(x)[:, 1:]


class EvaLayer(nn.Module):
    """One block; its keys have no bias."""

    folds: ClassVar = (Fold(maker="v_proj", readers=("out_proj",)),)
    FFN: ClassVar[FeedForward] = (("fc1",), "fc2")

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(3))
        self.k_proj = Linear(width, width, bias=False)
        self.norm1, self.norm2 = (LayerNorm(width, config.layer_norm_eps) for _ in range(2))
        self.fc1 = Linear(width, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        attended = ops.multi_head_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads)
        x = x + self.norm1(self.out_proj(attended))
        return x + self.norm2(self.fc2(ops.gelu(self.fc1(x))))
