"""MiniCPM-V 4.5: SigLIP2 navit tower, resampler with temporal positions for packed video frames, Qwen3 decoder.

Checkpoint layout and behaviour: https://huggingface.co/openbmb/MiniCPM-V-4_5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcv_export import config as cfg
from mcv_export import texts
from mcv_export.checkpoint import Checkpoint
from mcv_export.families import _resampler_generation as parts
from mcv_export.plan import Description, Family, ModelPlan
from mcv_runtime.bundle.manifest import VideoSpec


def _recognises(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["MiniCPMV"] and str(config.get("version")) == "4.5"


def plan(checkpoint: Checkpoint) -> ModelPlan:
    config = checkpoint.config
    tower = parts.tower_config(config)
    resampler = parts.resampler_config(config, tower.hidden_size)
    decoder = parts.decoder_config(config, qk_norm=True)
    cfg.expect(config, "batch_3d_resampler", True)
    generation = parts.generation(
        checkpoint, decoder, "<|im_end|>", "<|endoftext|>", repetition_penalty=1.03, max_new_tokens=2048
    )
    template = texts.chat_template(checkpoint, asked="tokenizer")
    return ModelPlan(
        graphs=(parts.vision_encoder(tower), parts.resampler(resampler, temporal=True), parts.decoder(checkpoint, decoder)),
        hidden_size=decoder.hidden_size,
        image=parts.image_spec(checkpoint, tower),
        placeholder=parts.placeholder(checkpoint, resampler.num_queries),
        video=VideoSpec(strategy="packed", max_num_frames=180),
        text=parts.text_spec(checkpoint, decoder, template),
        generation=generation,
        chat_template=template,
    )


FAMILY = Family(
    name="minicpmv4_5",
    title="MiniCPM-V 4.5",
    recognises=_recognises,
    read=plan,
    description=Description(
        sizes="8B",
        config="`MiniCPMV`, `version` 4.5",
        vision="SigLIP2 so400m/14, slices of any shape",
        compression="resampler, 64 queries, positions in time",
        language_model="Qwen3 8B",
        inputs="pictures, video",
    ),
)
