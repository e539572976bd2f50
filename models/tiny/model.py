"""The tiny model: the shared graph modules in a small size, and how they are initialised."""

from __future__ import annotations

from collections import defaultdict

import torch
from batches import LABEL_SIZES, QUERIES, Batch, tiny_image_spec
from torch import Tensor, nn
from torch.func import functional_call

from mcv_graphs.decoder import Decoder, DecoderConfig
from mcv_graphs.layers import Embedding, LayerNorm, Linear, RMSNorm
from mcv_graphs.resampler import Resampler, ResamplerConfig, sincos_positions
from mcv_graphs.siglip import SiglipConfig, SiglipTower

VISION = SiglipConfig(
    hidden_size=160,
    intermediate_size=640,
    num_layers=4,
    num_heads=5,
    patch_size=14,
    position_table_side=tiny_image_spec().position_table_side,
)
RESAMPLER = ResamplerConfig(hidden_size=128, vision_size=160, num_queries=QUERIES * QUERIES, num_heads=1)


def decoder_config(vocab_size: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
        context_length=4096, rms_norm_eps=1e-6, rope_theta=10000.0, qkv_bias=True,
    )  # fmt: skip


class TinyModel(nn.Module):
    """Tower, resampler and decoder, computing in `dtype`; the two dense heads serve training alone and are not saved."""

    def __init__(self, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.tower = SiglipTower(VISION)
        self.resampler = Resampler(RESAMPLER)
        self.decoder = Decoder(decoder_config(vocab_size))
        self.patch_head = nn.Linear(VISION.hidden_size, sum(LABEL_SIZES))
        self.query_head = nn.Linear(RESAMPLER.hidden_size, sum(LABEL_SIZES))
        initialise(self)

    def see(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Per slice: what the tower [B, L, Dv] and the resampler [B, queries, D] make of it; equal grids share one call."""
        groups: dict[bytes, list[int]] = defaultdict(list)
        for number, positions in enumerate(batch.patch_positions):
            groups[positions.numpy().tobytes()].append(number)
        patches: dict[int, Tensor] = {}
        visual: dict[int, Tensor] = {}
        weights = cast_parameters(self.tower, self.dtype)
        for numbers in groups.values():
            pixels = torch.cat([batch.pixels[number] for number in numbers]).to(self.dtype)
            features = functional_call(
                self.tower, weights, (pixels, batch.position_ids[numbers[0]].expand(len(pixels), -1))
            ).float()
            tokens = self.resampler(features, batch.patch_positions[numbers[0]])
            for number, one, other in zip(numbers, features.chunk(len(numbers)), tokens.chunk(len(numbers)), strict=True):
                patches[number], visual[number] = one, other
        order = range(len(batch.pixels))
        return [patches[number] for number in order], [visual[number] for number in order]

    def answer_logits(self, batch: Batch, visual: list[Tensor]) -> Tensor:
        """Logits at the positions that predict an answer token: [R, vocab]."""
        rows, length = batch.input_ids.shape
        past = empty_cache(self.decoder, rows)
        vision = torch.cat(visual, dim=1).flatten(0, 1).to(self.dtype)
        total = torch.tensor([length], dtype=torch.int32)
        seqlens = total.expand(rows) - 1
        arguments = (batch.input_ids, vision, batch.vision_positions, batch.logit_positions, seqlens, total, past)
        logits: Tensor = functional_call(self.decoder, cast_parameters(self.decoder, self.dtype), arguments)[0]
        return logits.float()


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's parameters for one call in `dtype`; gradients reach the originals."""
    return {name: parameter.to(dtype) for name, parameter in module.named_parameters()}


def empty_cache(decoder: Decoder, rows: int) -> list[Tensor]:
    config = decoder.config
    return [torch.zeros(rows, config.num_kv_heads, 0, config.head_dim) for _ in range(2 * config.num_layers)]


@torch.no_grad()
def initialise(model: TinyModel) -> None:
    """Usual scales, but positions that mean places from the start, and resampler queries that each look at one patch.

    Without the latter two the model stays for long on a plateau where it does not read at all.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    for name, parameter in model.named_parameters():
        if name.endswith(
            ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
        ):  # what feeds the residual sums
            parameter.mul_((2 * VISION.num_layers) ** -0.5)
    nn.init.normal_(model.decoder.lm_head.weight, std=0.02)
    side = VISION.position_table_side
    table = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).reshape(-1, 2)
    wide = 1.0 / 64.0 ** (torch.arange(VISION.hidden_size // 4) / (VISION.hidden_size // 4))
    model.tower.position_embedding.weight.copy_(sincos_positions(table, wide) * 0.7)
    localise(model.resampler)


def localise(resampler: Resampler, sharpness: float = 6.0, content: float = 0.05) -> None:
    """Query i starts as the position of cell i, and only the positions' fast frequencies decide where it looks."""
    width, cells = RESAMPLER.hidden_size, torch.arange(QUERIES)
    grid = torch.stack(torch.meshgrid(cells, cells, indexing="ij"), dim=-1).reshape(-1, 2)
    resampler.query.copy_(sincos_positions(grid, resampler.frequencies))
    fast = ((torch.arange(width) % (width // 4)) < 12).float() * sharpness
    resampler.q_proj.weight.copy_(torch.diag(fast) + torch.randn(width, width) * 0.02)
    resampler.k_proj.weight.copy_(torch.diag(fast) + torch.randn(width, width) * 0.02)
    resampler.ln_kv.weight.fill_(content)
    for linear in (resampler.v_proj, resampler.out_proj, resampler.proj):
        linear.weight.copy_(torch.eye(width) + torch.randn(width, width) * 0.02)
    resampler.v_proj.weight.mul_(1 / content / 4)
