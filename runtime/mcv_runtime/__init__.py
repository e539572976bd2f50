"""Ask MiniCPM-V models about pictures with ONNX Runtime, without torch: start with `load`."""

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.conversation.chat import Chat
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
from mcv_runtime.pictures.picture import Clip, Picture
from mcv_runtime.pictures.video import Video
from mcv_runtime.progress import Event, Progress
from mcv_runtime.request.answer import Answer, Completion, Timings
from mcv_runtime.request.options import Options
from mcv_runtime.request.request import Request
from mcv_runtime.text.prompts import Prompt

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
