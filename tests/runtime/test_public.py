"""What is public, and what importing it costs."""

import subprocess
import sys

import pytest

import mcv_runtime

PUBLIC = {
    "Answer", "Bundle", "BundleCorruptError", "BundleError", "Chat", "ChatFileError", "CheckpointError", "Clip",
    "ColumnAnswerer", "Completion", "Document",
    "Engine", "EngineInfo", "Event", "ImageError", "MachineError", "McvError", "MemoryUse", "OptionError", "Options",
    "OutputError", "Page", "Picture", "PictureOptions", "Piece", "Progress", "Prompt", "PromptError", "Region", "Request",
    "ResourceError", "RunError", "Ticket", "Timings", "Video", "load", "locate", "read_as",
}  # fmt: skip


def test_public_names():
    assert set(mcv_runtime.__all__) == PUBLIC
    assert sorted(mcv_runtime.__all__) == list(mcv_runtime.__all__)
    assert all(hasattr(mcv_runtime, name) for name in mcv_runtime.__all__)


def test_errors_are_builtins_too():
    builtins = {
        "BundleError": FileNotFoundError, "ChatFileError": ValueError, "ImageError": ValueError,
        "MachineError": RuntimeError, "OutputError": OSError, "PromptError": ValueError,
        "ResourceError": MemoryError, "RunError": RuntimeError,
    }  # fmt: skip
    for name, builtin in builtins.items():
        error = getattr(mcv_runtime, name)
        assert issubclass(error, mcv_runtime.McvError)
        assert issubclass(error, builtin)


@pytest.mark.waits
def test_importing_changes_nothing_and_brings_no_toolchain():
    code = (
        "import logging, os, sys, threading, warnings\n"
        "before = (dict(os.environ), list(logging.root.handlers), threading.active_count(), list(warnings.filters))\n"
        "import numpy, onnxruntime, PIL.Image, tokenizers, jinja2\n"
        "before = (*before[:3], list(warnings.filters))\n"
        "import mcv_runtime\n"
        "assert before == (dict(os.environ), list(logging.root.handlers), threading.active_count(), list(warnings.filters))\n"
        "assert PIL.Image.MAX_IMAGE_PIXELS == 89478485\n"
        "unwanted = ('torch', 'transformers', 'onnx', 'typer', 'ray', 'fsspec', 'pyarrow')\n"
        "print([name for name in unwanted if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_whatever_an_error_repeats_it_is_one_printable_line():
    import mcv_runtime.errors as errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.McvError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert str(kind("config has a='\x1b[31mred\n\x00'; 改 it")) == "config has a='\\x1b[31mred\\n\\x00'; 改 it"
