"""Ask MiniCPM-V models about pictures with ONNX Runtime, without torch: start with `load`."""

from mcv_runtime.answers import Answer, Completion, Timings
from mcv_runtime.bundle import Bundle
from mcv_runtime.chat import Chat
from mcv_runtime.engine import Engine, load
from mcv_runtime.errors import (
    BundleCorruptError,
    BundleError,
    ChatFileError,
    CheckpointError,
    ImageError,
    McvError,
    OptionError,
    OutputError,
    PromptError,
    ResourceError,
    RunError,
)
from mcv_runtime.progress import Event, Progress
from mcv_runtime.prompts import Prompt
from mcv_runtime.requests import Request
from mcv_runtime.settings import Options
from mcv_runtime.video import Video
from mcv_runtime.vision import Clip, Picture

__all__ = [
    "Answer",
    "Bundle",
    "BundleCorruptError",
    "BundleError",
    "Chat",
    "ChatFileError",
    "CheckpointError",
    "Clip",
    "Completion",
    "Engine",
    "Event",
    "ImageError",
    "McvError",
    "OptionError",
    "Options",
    "OutputError",
    "Picture",
    "Progress",
    "Prompt",
    "PromptError",
    "Request",
    "ResourceError",
    "RunError",
    "Timings",
    "Video",
    "load",
]
