"""MiniCPM-OCR 1.0: the network of 4.6 with 4 patches a visual token, and a choice of what to do with small pictures.

Source: https://huggingface.co/openbmb/MiniCPM-OCR-1.0 and transformers 5.23 (`minicpm_ocr`).
"""

from __future__ import annotations

from mcv_export.families import _merger_generation as generation
from mcv_export.plan import Description, Family

_TRAITS = generation.Traits(
    model_type="minicpm_ocr",
    architecture="MiniCPMOcrForConditionalGeneration",
    downsample_mode="4x",
    upsizes_by_choice=True,
)

FAMILY = Family(
    name="minicpm_ocr",
    title="MiniCPM-OCR 1.0",
    recognises=_TRAITS.recognises,
    read=lambda checkpoint: generation.plan(checkpoint, _TRAITS),
    description=Description(
        sizes="1.3B",
        config="`MiniCPMOcrForConditionalGeneration`",
        vision="as 4.6",
        compression="as 4.6, 4 patches a token by default",
        language_model="as 4.6",
        inputs="pictures, video; 16x, 4x",
    ),
)
