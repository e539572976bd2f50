"""MiniCPM-V 4.6: SigLIP2 tower with a window merger, merger, Qwen3.5 decoder; 16 or 4 patches a visual token.

Source: https://huggingface.co/openbmb/MiniCPM-V-4.6 and transformers 5.23 (`minicpmv4_6`).
"""

from __future__ import annotations

from mcv_export.families import _merger_generation as generation
from mcv_export.plan import Description, Family

_TRAITS = generation.Traits(model_type="minicpmv4_6", architecture="MiniCPMV4_6ForConditionalGeneration")

FAMILY = Family(
    name="minicpmv4_6",
    title="MiniCPM-V 4.6",
    recognises=_TRAITS.recognises,
    read=lambda checkpoint: generation.plan(checkpoint, _TRAITS),
    description=Description(
        sizes="1.3B",
        config="`MiniCPMV4_6ForConditionalGeneration`",
        vision="SigLIP2 so400m/14, windows merged inside",
        compression="merger, 16 or 4 patches a token",
        language_model="Qwen3.5 0.8B, linear attention in three of four layers",
        inputs="pictures, video; 16x, 4x",
    ),
)
