"""Ask MiniCPM-V models about pictures with ONNX Runtime, without torch: start with `load`."""

from typing import TYPE_CHECKING

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.conversation.chat import Chat
from mcv_runtime.decoding.ticket import Ticket
from mcv_runtime.documents.document import Document, Page
from mcv_runtime.engine import Engine, load
from mcv_runtime.errors import (
    BundleCorruptError,
    BundleError,
    ChatFileError,
    CheckpointError,
    ImageError,
    MachineError,
    McvError,
    OptionError,
    OutputError,
    PromptError,
    ResourceError,
    RunError,
)
from mcv_runtime.facts import EngineInfo, MemoryUse
from mcv_runtime.pictures import video_file as video_file  # also under the name that it had before there were rooms
from mcv_runtime.pictures.picture import Clip, Picture
from mcv_runtime.pictures.video import Video
from mcv_runtime.progress import Event, Progress
from mcv_runtime.request.answer import Answer, Completion, Piece, Timings
from mcv_runtime.request.options import Options, PictureOptions
from mcv_runtime.request.request import Request
from mcv_runtime.text.grounding import Region, locate
from mcv_runtime.text.prompts import Prompt
from mcv_runtime.text.reading import read_as

if TYPE_CHECKING:
    from mcv_runtime.distributed.columns import ColumnAnswerer

__all__ = [
    "Answer",
    "Bundle",
    "BundleCorruptError",
    "BundleError",
    "Chat",
    "ChatFileError",
    "CheckpointError",
    "Clip",
    "ColumnAnswerer",
    "Completion",
    "Document",
    "Engine",
    "EngineInfo",
    "Event",
    "ImageError",
    "MachineError",
    "McvError",
    "MemoryUse",
    "OptionError",
    "Options",
    "OutputError",
    "Page",
    "Picture",
    "PictureOptions",
    "Piece",
    "Progress",
    "Prompt",
    "PromptError",
    "Region",
    "Request",
    "ResourceError",
    "RunError",
    "Ticket",
    "Timings",
    "Video",
    "load",
    "locate",
    "read_as",
]


def __getattr__(name: str) -> object:
    if name == "ColumnAnswerer":  # with all that reads tables, which most do not need
        from mcv_runtime.distributed.columns import ColumnAnswerer

        return ColumnAnswerer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
