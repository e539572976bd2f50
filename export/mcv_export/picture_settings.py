"""A checkpoint's settings for pictures and videos, in the files where transformers 4 and 5 keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcv_export import config as cfg
from mcv_export.checkpoint import Checkpoint


def picture_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Those of the image processor: in processor_config.json (transformers 5) or else in preprocessor_config.json."""
    return _settings(checkpoint, "image_processor", "preprocessor_config.json")


def video_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Those of the video processor, where it has its own; empty otherwise."""
    return _settings(checkpoint, "video_processor", "video_preprocessor_config.json")


def _settings(checkpoint: Checkpoint, key: str, file: str) -> Mapping[str, Any]:
    processor = checkpoint.json("processor_config.json")
    return cfg.section(processor, key) if key in processor else checkpoint.json(file)
