"""The perceiver resampler that compresses a slice's patches to a fixed number of tokens: the graph `resampler`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs.folds import Fold, behind_norm
from mcv_graphs.layers import LayerNorm, Linear

_POSITIONS = 0.5**0.5
"""Root mean square of sines and cosines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResamplerConfig:
    """`hidden_size` is the language model's width, `vision_size` the tower's.

    `query_positions`: the checkpoint has a position for each query (2.0).
    """

    hidden_size: int
    vision_size: int
    num_queries: int
    num_heads: int
    layer_norm_eps: float = 1e-6
    query_positions: bool = False


class Resampler(nn.Module):
    """Learned queries attend to the patches of one slice; keys carry the patch's position, values do not."""

    frequencies: Tensor

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.query = nn.Parameter(torch.empty(config.num_queries, width))
        if config.query_positions:
            self.query_position = nn.Parameter(torch.empty(config.num_queries, width))
        # The published checkpoints have no kv_proj where tower and language model are equally wide.
        projected = config.vision_size != width
        self.kv_proj = Linear(config.vision_size, width, bias=False) if projected else nn.Identity()
        self.ln_q, self.ln_kv, self.ln_post = (LayerNorm(width, eps) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))
        self.proj = Linear(width, width, bias=False)
        self.register_buffer("frequencies", position_frequencies(width), persistent=False)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Keys are the norm's output with positions added, values are not: neither may change it for the other."""
        return (
            Fold(maker="ln_q", readers=("q_proj",), free=not self.config.query_positions),
            Fold(maker="ln_kv", readers=("k_proj",), added=_POSITIONS, free=False),
            Fold(maker="ln_kv", readers=("v_proj",), free=False),
            Fold(maker="v_proj", readers=("out_proj",)),
            behind_norm("ln_post", "proj"),
        )

    def forward(self, vision_hidden: Tensor, patch_positions: Tensor) -> Tensor:
        """vision_hidden [S, L, vision_size], patch_positions [L, 2] (row, column) -> [S, queries, hidden]."""
        return self.resample(vision_hidden, sincos_positions(patch_positions, self.frequencies))

    def resample(self, vision_hidden: Tensor, key_positions: Tensor) -> Tensor:
        """vision_hidden [S, L, vision_size], key_positions [L, hidden] -> [S, queries, hidden]."""
        values = self.ln_kv(self.kv_proj(vision_hidden))
        keys = values + key_positions
        queries = self.ln_q(self.query)
        if self.config.query_positions:
            queries = queries + self.query_position
        queries = self.q_proj(queries).unsqueeze(0).expand(vision_hidden.shape[0], -1, -1)
        attended = ops.multi_head_attention(queries, self.k_proj(keys), self.v_proj(values), self.config.num_heads)
        return self.proj(self.ln_post(self.out_proj(attended)))


class TemporalResampler(Resampler):
    """A resampler whose keys carry a time too, so that the patches of several frames compress to one set of tokens."""

    time_frequencies: Tensor

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__(config)
        self.register_buffer("time_frequencies", time_frequencies(config.hidden_size), persistent=False)

    def forward(  # type: ignore[override]  # another graph, with an input more
        self, vision_hidden: Tensor, patch_positions: Tensor, patch_times: Tensor
    ) -> Tensor:
        """As `Resampler`, L patches of all frames; patch_times [L]: the frame's time, -1 in a still picture."""
        angles = ops.to_float(patch_times).unsqueeze(-1) * self.time_frequencies
        times = torch.cat((angles.sin(), angles.cos()), dim=-1) * ops.to_float(patch_times >= 0).unsqueeze(-1)
        return self.resample(vision_hidden, sincos_positions(patch_positions, self.frequencies) + times)


class FixedResampler(Resampler):
    """A resampler for slices of one size, the positions of whose patches are constants."""

    key_positions: Tensor

    def __init__(self, config: ResamplerConfig, patches: int) -> None:
        super().__init__(config)
        self.register_buffer("key_positions", torch.empty(patches, config.hidden_size), persistent=False)

    def forward(self, vision_hidden: Tensor) -> Tensor:  # type: ignore[override]  # another graph, with an input less
        """vision_hidden [S, L, vision_size] -> [S, queries, hidden]."""
        return self.resample(vision_hidden, self.key_positions)


def time_frequencies(width: int) -> Tensor:
    """Radians per time step of each sine-cosine pair: [width / 2] float32."""
    count = width // 2
    return 1.0 / 10000.0 ** (torch.arange(count, dtype=torch.float32) / count)


def position_frequencies(width: int) -> Tensor:
    """Radians per patch of each sine-cosine pair: [width / 4] float32."""
    count = width // 4
    return 1.0 / 10000.0 ** (torch.arange(count, dtype=torch.float32) / count)


def sincos_positions(patch_positions: Tensor, frequencies: Tensor) -> Tensor:
    """[L, 2] (row, column) -> [L, width]: the first half encodes the column, the second the row, each as sines then cosines."""
    angles = ops.to_float(patch_positions).unsqueeze(-1) * frequencies  # [L, 2, width / 4]
    row, column = angles.unbind(1)
    return torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), dim=-1)
