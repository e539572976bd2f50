"""MiniCPM-V 4.7-1B: as 4.6, with tokens placed on a canvas of time, row and column; its videos are never numbered.

Source: https://huggingface.co/openbmb/MiniCPM-V-4.7-1B and transformers 5.23 (`minicpmv4_7`). The variants with a mixture of
experts are not covered.
"""

from __future__ import annotations

from mcv_export.families import _merger_generation as generation
from mcv_export.plan import Description, Family

_TRAITS = generation.Traits(
    model_type="minicpmv4_7", architecture="MiniCPMV4_7ForConditionalGeneration", positions="canvas", video_ids=False
)

FAMILY = Family(
    name="minicpmv4_7",
    title="MiniCPM-V 4.7",
    recognises=_TRAITS.recognises,
    read=lambda checkpoint: generation.plan(checkpoint, _TRAITS),
    description=Description(
        sizes="1.6B",
        config="`MiniCPMV4_7ForConditionalGeneration`",
        vision="as 4.6",
        compression="as 4.6",
        language_model="as 4.6, positions on a canvas",
        inputs="pictures, video; 16x, 4x",
        left_out="mixtures of experts",
    ),
)
