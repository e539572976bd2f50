"""The precisions that a graph's weights can have."""

from __future__ import annotations

from typing import Literal

from mcv_runtime.manifest import GraphName

Precision = Literal["fp32", "q8", "q4"]

BITS: dict[Precision, int] = {"fp32": 32, "q8": 8, "q4": 4}

DEFAULT: dict[GraphName, Precision] = {"vision_encoder": "q8", "resampler": "q8", "decoder_with_past": "q4"}
"""4 bits lose too much of a vision tower and save little beside the decoder."""

ROLES: dict[GraphName, GraphName] = {
    "vision_encoder_16x": "vision_encoder",
    "vision_encoder_4x": "vision_encoder",
    "merger": "resampler",
}
"""Whose precision a graph has if it is not named itself."""
