"""MiniCPM-V 1.0 and 2.0: timm's SigLIP without its last block, resampler with positioned queries, MiniCPM-2B decoder.

Checkpoint layout and behaviour: https://huggingface.co/openbmb/MiniCPM-V-2. The constant factors of MiniCPM (of embeddings,
residuals and logits) go into the weights that they multiply. There is no chat template; the one here writes what chat() does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mcv_export import config as cfg
from mcv_export.checkpoint import Checkpoint
from mcv_export.families import _resampler_generation as parts
from mcv_export.plan import Description, Family, GraphPlan, ModelPlan, Part, same
from mcv_graphs.contract import resized_vision_encoder_io
from mcv_graphs.siglip import ResizedSiglipTower, SiglipConfig
from mcv_runtime.errors import CheckpointError, shown

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ {'user': '<用户>', 'assistant': '<AI>'}.get(message['role'], '') + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<AI>{% endif %}"
)
_TIMM_NAME = re.compile(r"vit_so400m_patch(\d+)_siglip_(\d+)(\..*)?")
_HEADS = 16
"""Attention heads of so400m, which no config of this family names."""


def _recognises(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["MiniCPMV"] and "version" not in config and "vision_encoder" in config


def _plan(checkpoint: Checkpoint) -> ModelPlan:
    config = checkpoint.config
    tower = _tower_config(checkpoint)
    resampler = parts.resampler_config(config, tower.hidden_size, query_positions=True)
    decoder = parts.decoder_config(config)
    cfg.flag(config, "drop_vision_last_layer", True)  # the file holds the layers that are left
    return ModelPlan(
        graphs=(
            _vision_encoder(tower),
            parts.resampler(resampler, norm="vpm.norm"),
            parts.decoder(
                checkpoint,
                decoder,
                tied=True,
                embedding_scale=cfg.number(config, "scale_emb"),
                residual_scale=cfg.number(config, "scale_depth") / decoder.num_layers**0.5,
                logit_scale=cfg.number(config, "dim_model_base") / decoder.hidden_size,
            ),
        ),
        hidden_size=decoder.hidden_size,
        image=parts.image_spec(checkpoint, tower, positions="resized"),
        placeholder=parts.placeholder(checkpoint, resampler.num_queries, numbered=False),
        text=parts.text_spec(checkpoint, decoder, _CHAT_TEMPLATE),
        generation=parts.generation(checkpoint, decoder, "</s>", repetition_penalty=1.05, max_new_tokens=1024),
        chat_template=_CHAT_TEMPLATE,
    )


def _tower_config(checkpoint: Checkpoint) -> SiglipConfig:
    """Sizes from the tensors: config.json has only timm's name of the tower, which says the patch and the picture's side."""
    name = str(checkpoint.config["vision_encoder"])
    match = _TIMM_NAME.fullmatch(name)
    if not match:
        raise CheckpointError(f"config has vision_encoder={shown(name)}, which is not vit_so400m_patch14_siglip_384")
    patch_size, side = int(match[1]), int(match[2])
    blocks = {int(found[1]) for found in (re.match(r"vpm\.blocks\.(\d+)\.", tensor) for tensor in checkpoint.tensors) if found}
    if not blocks:
        raise CheckpointError(f"{checkpoint.folder} has no tensor vpm.blocks.0.norm1.weight; is a file of it missing?")
    intermediate, width = checkpoint.tensor("vpm.blocks.0.mlp.fc1.weight").shape
    return SiglipConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_layers=max(blocks) + 1,
        num_heads=_HEADS,
        patch_size=patch_size,
        position_table_side=side // patch_size,
        gelu="erf",
    )


def _vision_encoder(config: SiglipConfig) -> GraphPlan:
    width = config.hidden_size
    ours = {"layer_norm1": "norm1", "out_proj": "attn.proj", "layer_norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    packed = {
        f"layers.{layer}.{name}.{kind}": (
            Part(tensor=f"vpm.blocks.{layer}.attn.qkv.{kind}", rows=width, offset=index * width, stored=3 * width),
        )
        for layer in range(config.num_layers)
        for index, name in enumerate(("q_proj", "k_proj", "v_proj"))
        for kind in ("weight", "bias")
    }
    names = cfg.affine(
        {
            "patch_embedding": "vpm.patch_embed.proj",
            "post_layernorm": "vpm.norm",
            **{f"layers.*.{name}": f"vpm.blocks.*.{theirs}" for name, theirs in ours.items()},
        }
    )
    return GraphPlan(
        name="vision_encoder",
        module=lambda: ResizedSiglipTower(config),
        io=resized_vision_encoder_io(config.patch_size, width, config.position_table_side),
        weights={**same({**names, "position_embedding.weight": "vpm.pos_embed"}, config.num_layers), **packed},
    )


FAMILY = Family(
    name="minicpmv2_0",
    title="MiniCPM-V 1.0 and 2.0",
    recognises=_recognises,
    read=_plan,
    description=Description(
        sizes="2.8B",
        config="`MiniCPMV`, no `version`, `vision_encoder`",
        vision="SigLIP so400m/14",
        compression="resampler, 64 queries",
        language_model="MiniCPM-2B",
        left_out="a check of 1.0, for want of golden data",
    ),
)
