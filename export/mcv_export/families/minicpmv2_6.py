"""MiniCPM-V 2.6: SigLIP navit tower, resampler with 64 queries, Qwen2 decoder.

Checkpoint layout and behaviour: https://huggingface.co/openbmb/MiniCPM-V-2_6 (config.json, modeling_minicpmv.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcv_export import texts
from mcv_export.checkpoint import Checkpoint
from mcv_export.families import _resampler_generation as parts
from mcv_export.plan import Description, Family, ModelPlan
from mcv_runtime.bundle.manifest import VideoSpec


def _recognises(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["MiniCPMV"] and str(config.get("version")) == "2.6"


def plan(checkpoint: Checkpoint) -> ModelPlan:
    config = checkpoint.config
    tower = parts.tower_config(config)
    resampler = parts.resampler_config(config, tower.hidden_size)
    decoder = parts.decoder_config(config, qkv_bias=True)
    generation = parts.generation(
        checkpoint, decoder, "<|im_end|>", "<|endoftext|>", repetition_penalty=1.05, max_new_tokens=2048
    )
    template = texts.chat_template(checkpoint, asked="tokenizer")
    return ModelPlan(
        graphs=(parts.vision_encoder(tower), parts.resampler(resampler), parts.decoder(checkpoint, decoder)),
        hidden_size=decoder.hidden_size,
        image=parts.image_spec(checkpoint, tower),
        placeholder=parts.placeholder(checkpoint, resampler.num_queries),
        video=VideoSpec(strategy="strided", max_num_frames=64),
        text=parts.text_spec(checkpoint, decoder, template),
        generation=generation,
        chat_template=template,
    )


FAMILY = Family(
    name="minicpmv2_6",
    title="MiniCPM-V 2.6",
    recognises=_recognises,
    read=plan,
    description=Description(
        sizes="8B",
        config="`MiniCPMV`, `version` 2.6",
        vision="SigLIP so400m/14, slices of any shape",
        compression="resampler, 64 queries",
        language_model="Qwen2 7B",
        inputs="pictures, video",
    ),
)
