"""MiniCPM-Llama3-V 2.5: SigLIP navit tower over one strip of patches, resampler with 96 queries, Llama 3 decoder.

Checkpoint layout and behaviour: https://huggingface.co/openbmb/MiniCPM-Llama3-V-2_5. Its vision code numbers a slice's patches
as one row as long as the longest slice of the request, and lets the padding of shorter slices take part in attention. The
weights were trained with that, so it is reproduced: a picture's features depend a little on the pictures beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcv_export import config as cfg
from mcv_export import texts
from mcv_export.checkpoint import Checkpoint
from mcv_export.families import _resampler_generation as parts
from mcv_export.plan import Description, Family, ModelPlan


def _recognises(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["MiniCPMV"] and str(config.get("version")) == "2.5"


def _plan(checkpoint: Checkpoint) -> ModelPlan:
    config = checkpoint.config
    tower = parts.tower_config(config)
    resampler = parts.resampler_config(config, tower.hidden_size)
    decoder = parts.decoder_config(config)
    cfg.expect(config, "batch_vision_input", True)  # without, each slice would be numbered and padded by itself
    generation = parts.generation(
        checkpoint, decoder, "<|end_of_text|>", "<|eot_id|>", repetition_penalty=1.05, max_new_tokens=1024
    )
    template = texts.chat_template(checkpoint, asked="tokenizer")
    return ModelPlan(
        graphs=(parts.vision_encoder(tower), parts.resampler(resampler), parts.decoder(checkpoint, decoder)),
        hidden_size=decoder.hidden_size,
        image=parts.image_spec(checkpoint, tower, positions="strip"),
        placeholder=parts.placeholder(checkpoint, resampler.num_queries, numbered=False),
        text=parts.text_spec(checkpoint, decoder, template),
        generation=generation,
        chat_template=template,
    )


FAMILY = Family(
    name="minicpmv2_5",
    title="MiniCPM-Llama3-V 2.5",
    recognises=_recognises,
    read=_plan,
    description=Description(
        sizes="8B",
        config="`MiniCPMV`, `version` 2.5",
        vision="SigLIP so400m/14, slices of any shape",
        compression="resampler, 96 queries",
        language_model="Llama 3 8B",
    ),
)
