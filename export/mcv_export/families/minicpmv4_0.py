"""MiniCPM-V 4.0: SigLIP2 navit tower, resampler with 64 queries, MiniCPM4-3B decoder (a plain Llama with longrope).

Checkpoint layout and behaviour: https://huggingface.co/openbmb/MiniCPM-V-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mcv_export import config as cfg
from mcv_export.checkpoint import Checkpoint
from mcv_export.families import _resampler_generation as parts
from mcv_export.plan import Description, Family, ModelPlan
from mcv_runtime.bundle.manifest import TextSpec, VideoSpec
from mcv_runtime.errors import CheckpointError


def _recognises(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["MiniCPMV"] and str(config.get("version")) in ("4", "4.0")


def _plan(checkpoint: Checkpoint) -> ModelPlan:
    config = checkpoint.config
    tower = parts.tower_config(config)
    resampler = parts.resampler_config(config, tower.hidden_size)
    decoder = parts.decoder_config(config)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "longrope":
        factors = cfg.numbers(scaling, "short_factor", ())
        if len(factors) != decoder.head_dim // 2:
            wanted = decoder.head_dim // 2
            raise CheckpointError(f"config has {len(factors)} short_factor values for {wanted} rotary frequencies")
        # The long factors begin past this length, and would change every earlier key; no published checkpoint goes there.
        limit = min(decoder.context_length, cfg.integer(scaling, "original_max_position_embeddings", decoder.context_length))
        decoder = replace(decoder, rope_factors=factors, context_length=limit)
    elif kind is not None:
        raise CheckpointError(f"config has rope_scaling of type {kind!r}; MiniCPM-V 4.0 has longrope")
    return ModelPlan(
        graphs=(parts.vision_encoder(tower), parts.resampler(resampler), parts.decoder(decoder)),
        hidden_size=decoder.hidden_size,
        image=parts.image_spec(checkpoint, tower),
        placeholder=parts.placeholder(checkpoint, resampler.num_queries),
        video=VideoSpec(max_num_frames=64),
        text=TextSpec(
            vocab_size=decoder.vocab_size,
            context_length=decoder.context_length,
            dropped_ids=(0,),
            template_variables=cfg.template_variables(checkpoint),
        ),
        generation=cfg.generation(checkpoint, stop_tokens=("<|im_end|>", "</s>"), repetition_penalty=1.05, max_new_tokens=2048),
    )


FAMILY = Family(
    name="minicpmv4_0",
    title="MiniCPM-V 4.0",
    recognises=_recognises,
    plan=_plan,
    description=Description(
        sizes="4B",
        config="`MiniCPMV`, `version` 4.0",
        vision="SigLIP2 so400m/14, slices of any shape",
        compression="resampler, 64 queries",
        language_model="MiniCPM4 3B",
        inputs="pictures, video",
    ),
)
