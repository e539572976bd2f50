"""Ask MiniCPM-V models about pictures with ONNX Runtime, without torch: start with `load`."""

from mcv_runtime.answers import Answer, Timings
from mcv_runtime.bundle import Bundle
from mcv_runtime.engine import Engine, load
from mcv_runtime.errors import (
    BundleCorruptError,
    BundleError,
    CheckpointError,
    ImageError,
    McvError,
    OptionError,
    OutputError,
    PromptError,
)
from mcv_runtime.prompts import Prompt
from mcv_runtime.video import Video
from mcv_runtime.vision import Clip, Picture

__all__ = [
    "Answer",
    "Bundle",
    "BundleCorruptError",
    "BundleError",
    "CheckpointError",
    "Clip",
    "Engine",
    "ImageError",
    "McvError",
    "OptionError",
    "OutputError",
    "Picture",
    "Prompt",
    "PromptError",
    "Timings",
    "Video",
    "load",
]
