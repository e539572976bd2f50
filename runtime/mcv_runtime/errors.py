"""Every error that mcv raises on purpose.

    McvError
    |-- BundleError           (FileNotFoundError)  a bundle, or a file of it, is missing
    |-- BundleCorruptError    (ValueError)         a bundle file is truncated, altered or unreadable
    |-- MachineError          (RuntimeError)       a bundle needs another processor, or a newer ONNX Runtime
    |-- CheckpointError       (ValueError)         a published checkpoint cannot be used
    |-- OutputError           (OSError)            a result cannot be written
    |-- ImageError            (ValueError)         a picture cannot be used
    |-- GateError             (ValueError)         a bundle costs more than it may; exit code 3
    |-- PromptError           (ValueError)         a prompt cannot be used
    |-- ChatFileError         (ValueError)         a saved conversation cannot be used
    |-- OptionError           (ValueError)         an option has a value that makes no sense
    |-- ResourceError         (MemoryError)        there is not enough memory
    `-- RunError              (RuntimeError)       ONNX Runtime failed while it ran a graph

Each is also the builtin that a host application would catch anyway. A message is one line that says
what is wrong and, where there is something to do, what to do next.
"""


class McvError(Exception):
    """Base of all errors that mcv raises on purpose."""

    exit_code = 2
    """Of a command that ends with it."""

    def __str__(self) -> str:
        """One line, whatever of a stranger's it repeats."""
        return printable(super().__str__())


class BundleError(McvError, FileNotFoundError):
    """A bundle, or one of its files, is not there."""


class BundleCorruptError(McvError, ValueError):
    """A bundle's file does not hold what its manifest says."""


class MachineError(McvError, RuntimeError):
    """A bundle is made for another processor, or a newer ONNX Runtime, than there is."""


class CheckpointError(McvError, ValueError):
    """A checkpoint is missing, incomplete, or of no known family."""


class OutputError(McvError, OSError):
    """A result cannot be written."""


class ImageError(McvError, ValueError):
    """A picture cannot be read, or is beyond a limit."""


class GateError(McvError, ValueError):
    """A bundle was measured and costs more than it may."""

    exit_code = 3


class PromptError(McvError, ValueError):
    """A prompt is empty, malformed, or longer than the context."""


class ChatFileError(McvError, ValueError):
    """A saved conversation is damaged, or of another bundle."""


class OptionError(McvError, ValueError):
    """An option has a value that makes no sense."""


class ResourceError(McvError, MemoryError):
    """There is not enough memory, not even for the smallest step."""


class RunError(McvError, RuntimeError):
    """ONNX Runtime failed while it ran a graph."""


def printable(text: str) -> str:
    """A stranger's text as it may be printed: control characters, which a terminal would obey, as their escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shown(value: object, limit: int = 80) -> str:
    """A stranger's value as it may stand in a message: printable, on one line, at most `limit` characters of it."""
    if isinstance(value, str) and len(value) > limit:
        return f"{printable(repr(value[:limit]))}..."
    text = printable(repr(value))
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."
