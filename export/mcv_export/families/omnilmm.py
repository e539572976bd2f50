"""OmniLMM-12B: timm's EVA02-CLIP-E without its last block, resampler with a fixed grid of 64 queries, Zephyr (Mistral) decoder.

Checkpoint layout and behaviour: https://huggingface.co/openbmb/OmniLMM-12B and the omnilmm package of
https://github.com/OpenBMB/MiniCPM-V. One picture size, no slices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mcv_export import config as cfg
from mcv_export import texts
from mcv_export.checkpoint import Checkpoint
from mcv_export.families import _resampler_generation as parts
from mcv_export.plan import Description, Family, GraphPlan, ModelPlan, Part, same
from mcv_graphs.contract import fixed_resampler_io, fixed_vision_encoder_io
from mcv_graphs.eva import EvaConfig, EvaTower
from mcv_graphs.resampler import FixedResampler, ResamplerConfig, position_frequencies
from mcv_runtime.bundle.manifest import ImageSpec, PlaceholderSpec
from mcv_runtime.errors import CheckpointError

_TOWER, _RESAMPLER = "model.vision_tower", "model.resampler"
_HEADS = 16
"""Attention heads of eva02_enormous, which no config of this family names."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': \"You are an artificial "
    "intelligence assistant, which gives helpful, detailed, and polite answers to the human's questions.\"}] + messages %}"
    "{% endif %}"
)


def _recognises(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["OmniLMMForCausalLM"]


def _plan(checkpoint: Checkpoint) -> ModelPlan:
    config = checkpoint.config
    tower = _tower_config(checkpoint)
    hidden, queries = cfg.integer(config, "hidden_size"), cfg.integer(config, "num_query")
    resampler = ResamplerConfig(
        hidden_size=hidden,
        vision_size=tower.hidden_size,
        num_queries=queries,
        num_heads=max(hidden // 128, 1),
        query_positions=True,
    )
    decoder = parts.decoder_config(config, sliding=True)
    ids = texts.token_ids(checkpoint)
    if missing := [token for token in ("<im_patch>", "<im_start>", "<im_end>") if token not in ids]:
        raise CheckpointError(f"tokenizer.json lacks {missing[0]}; add the picture tokens to it as the published chat.py does")
    generation = parts.generation(checkpoint, decoder, "</s>", repetition_penalty=1.1, max_new_tokens=1024)
    template = _DEFAULT_SYSTEM + texts.chat_template(checkpoint, asked="tokenizer")
    return ModelPlan(
        graphs=(
            _vision_encoder(tower, checkpoint),
            _resampler(resampler, tower, checkpoint),
            parts.decoder(checkpoint, decoder, prefix=""),
        ),
        hidden_size=hidden,
        image=ImageSpec(
            slicing="square",
            scale_resolution=tower.grid_side * tower.patch_size,
            patch_size=tower.patch_size,
            max_slice_nums=1,
            mean=_CLIP_MEAN,
            std=_CLIP_STD,
            positions="resized",
            position_table_side=tower.grid_side,
        ),
        placeholder=PlaceholderSpec(
            strategy="bracketed_slices",
            token="<im_patch>",
            tokens_per_slice=queries,
            image_start="<im_start>",
            image_end="<im_end>",
        ),
        # its chat() decodes with skip_special_tokens
        text=parts.text_spec(checkpoint, decoder, template, dropped_ids=texts.special_ids(checkpoint), stop_token="decoded"),
        generation=generation,
        chat_template=template,
        ignored_keys=("mm_", "use_mm_", "tune_", "freeze_"),
    )


def _tower_config(checkpoint: Checkpoint) -> EvaConfig:
    """Sizes from the tensors: config.json has only the side of a picture."""
    numbers = (re.match(rf"{re.escape(_TOWER)}\.blocks\.(\d+)\.", name) for name in checkpoint.tensors)
    blocks = {int(found[1]) for found in numbers if found}
    if not blocks:
        raise CheckpointError(f"{checkpoint.folder} has no tensor {_TOWER}.blocks.0.norm1.weight; is a file of it missing?")
    intermediate, width = checkpoint.tensor(f"{_TOWER}.blocks.0.mlp.fc1.weight").shape
    patch_size = checkpoint.tensor(f"{_TOWER}.patch_embed.proj.weight").shape[-1]
    return EvaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_layers=max(blocks) + 1,
        num_heads=_HEADS,
        patch_size=patch_size,
        grid_side=cfg.integer(checkpoint.config, "image_size", 448) // patch_size,
    )


def _vision_encoder(config: EvaConfig, checkpoint: Checkpoint) -> GraphPlan:
    width, patches = config.hidden_size, config.grid_side**2

    def table() -> NDArray[np.float32]:
        values = checkpoint.tensor(f"{_TOWER}.pos_embed")
        return values.rows(0, values.shape[1])

    def class_token() -> NDArray[np.float32]:
        return checkpoint.tensor(f"{_TOWER}.cls_token").rows(0, 1) + table()[:1]

    names = cfg.affine(
        {
            "patch_embedding": f"{_TOWER}.patch_embed.proj",
            "norm": f"{_TOWER}.norm",
            "layers.*.out_proj": f"{_TOWER}.blocks.*.attn.proj",
            **{f"layers.*.{name}": f"{_TOWER}.blocks.*.{name}" for name in ("norm1", "norm2")},
            **{f"layers.*.{name}": f"{_TOWER}.blocks.*.mlp.{name}" for name in ("fc1", "fc2")},
        }
    )
    names |= {f"layers.*.{name}_proj.bias": f"{_TOWER}.blocks.*.attn.{name}_bias" for name in ("q", "v")}
    packed = {
        f"layers.{layer}.{name}.weight": (
            Part(tensor=f"{_TOWER}.blocks.{layer}.attn.qkv.weight", rows=width, offset=index * width, stored=3 * width),
        )
        for layer in range(config.num_layers)
        for index, name in enumerate(("q_proj", "k_proj", "v_proj"))
    }
    return GraphPlan(
        name="vision_encoder",
        module=lambda: EvaTower(config),
        io=fixed_vision_encoder_io(config.patch_size, width, patches),
        weights={**same(names, config.num_layers), **packed},
        computed={"class_token": class_token, "positions": lambda: _resized(table()[1:], config.grid_side, antialias=True)},
        used=(f"{_TOWER}.pos_embed", f"{_TOWER}.cls_token"),
    )


def _resampler(config: ResamplerConfig, tower: EvaConfig, checkpoint: Checkpoint) -> GraphPlan:
    patches = tower.grid_side**2

    def key_positions() -> NDArray[np.float32]:
        table = checkpoint.tensor(f"{_RESAMPLER}.pos_embed").rows(0, config.num_queries)
        return _resized(table, tower.grid_side, antialias=False)

    return GraphPlan(
        name="resampler",
        module=lambda: FixedResampler(config, patches),
        io=fixed_resampler_io(config.vision_size, patches, config.num_queries, config.hidden_size),
        weights=parts.resampler_weights(config, _RESAMPLER),
        computed={"frequencies": lambda: position_frequencies(config.hidden_size).numpy(), "key_positions": key_positions},
        input_norms=parts.input_norms(config, f"{_TOWER}.norm"),
    )


def _resized(table: NDArray[np.float32], side: int, *, antialias: bool) -> NDArray[np.float32]:
    """A square table of positions [n * n, width] for a grid of another size: bicubic, [side * side, width]."""
    before = math.isqrt(len(table))
    if before == side:
        return table
    grid = torch.from_numpy(table).view(1, before, before, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=antialias, align_corners=False)
    array: NDArray[np.float32] = resized.permute(0, 2, 3, 1).reshape(side * side, -1).contiguous().numpy()
    return array


FAMILY = Family(
    name="omnilmm",
    title="OmniLMM-12B",
    recognises=_recognises,
    read=_plan,
    description=Description(
        sizes="12B",
        config="`OmniLMMForCausalLM`",
        vision="EVA02-CLIP-E/14, one square",
        compression="resampler, 64 queries",
        language_model="Zephyr (Mistral) 7B",
        verified="random weights, against timm and transformers",
    ),
)
