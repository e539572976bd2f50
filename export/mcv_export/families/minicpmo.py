"""MiniCPM-o 2.6 and 4.5, their vision and text path: as MiniCPM-V 2.6 and 4.5; hearing and speaking are left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mcv_export.checkpoint import Checkpoint
from mcv_export.families import minicpmv2_6, minicpmv4_5
from mcv_export.plan import Description, Family, ModelPlan

_HEARING_AND_SPEAKING = (
    *("audio_", "tts_", "init_", "stream", "listen_speak_type", "chunk_input"),
    *("chunk_length", "feature_size", "hop_length", "n_fft", "n_samples", "nb_max_frames", "padding_", "sampling_rate"),
    *("return_attention_mask", "dither"),
)
"""Beginnings of keys: of config.json, and of the feature extractor that shares preprocessor_config.json."""
_BY_VERSION = {"2.6": minicpmv2_6.plan, "4.5": minicpmv4_5.plan}


def _recognises(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["MiniCPMO"] and str(config.get("version")) in _BY_VERSION


def _plan(checkpoint: Checkpoint) -> ModelPlan:
    plan = _BY_VERSION[str(checkpoint.config["version"])](checkpoint)
    return dataclasses.replace(
        plan,
        ignored=(*plan.ignored, "apm.", "audio_projection_layer.", "audio_avg_pooler.", "tts."),
        ignored_keys=_HEARING_AND_SPEAKING,
        notice="the audio and speech weights (apm, audio_projection_layer, tts) are left out: a bundle sees and reads, no more",
    )


FAMILY = Family(
    name="minicpmo",
    title="MiniCPM-o 2.6 and 4.5 (vision and text)",
    recognises=_recognises,
    read=_plan,
    description=Description(
        sizes="8B, 9B",
        config="`MiniCPMO`, `version` 2.6 or 4.5",
        vision="as MiniCPM-V of that version",
        compression="as MiniCPM-V of that version",
        language_model="Qwen2.5 7B, Qwen3 8B",
        inputs="pictures, video",
        left_out="audio, speech",
    ),
)
