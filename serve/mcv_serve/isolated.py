"""Decode pictures in a process of its own, which may open neither a file nor a connection, whatever a picture makes it do.

Once the process has all that it needs, it gives up the right to open descriptors, to fork and to write, and all memory beyond
a bound. One that dies or takes too long is replaced; the picture is refused.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from mcv_runtime import ImageError, McvError
from mcv_runtime.pictures.formats import heic_reader
from mcv_runtime.pictures.images import open_picture

_SECONDS = 60.0
_MEMORY = 6 << 30


class IsolatedDecoder:
    """Makes encoded bytes Pillow pictures; threads may share it, and take turns."""

    def __init__(self, max_pixels: int, *, seconds: float = _SECONDS) -> None:
        self._max_pixels, self._seconds = max_pixels, seconds
        self._lock = threading.Lock()
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, data: bytes) -> Image.Image:
        """The upright RGB picture; raises `ImageError`."""
        with self._lock:
            pipe = self._started()
            try:
                pipe.send_bytes(data)
                if not pipe.poll(self._seconds):
                    raise EOFError
                kind, size, message = pipe.recv()
                pixels = pipe.recv_bytes() if kind == "picture" else b""
            except (EOFError, OSError):
                self.close()
                raise ImageError("the picture broke the process that decodes pictures, or kept it too long") from None
        if kind != "picture":
            raise ImageError(message)
        return Image.frombytes("RGB", size, pixels)

    def _started(self) -> Connection:
        if self._process is not None and self._process.is_alive() and self._pipe is not None:
            return self._pipe
        self.close()
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_decode_for_ever, args=(theirs, self._max_pixels), daemon=True)
        self._process.start()
        theirs.close()
        return self._pipe

    def close(self) -> None:
        """End the process."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _decode_for_ever(pipe: Connection, max_pixels: int) -> None:
    heic_reader()  # its library, as long as files can be opened
    _give_up_rights()
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            data = pipe.recv_bytes()
            try:
                picture = open_picture(data, max_pixels)
                pipe.send(("picture", picture.size, ""))
                pipe.send_bytes(picture.tobytes())
            except McvError as error:
                pipe.send(("error", (0, 0), str(error)))
            except MemoryError:
                pipe.send(("error", (0, 0), "there is not enough memory for the picture; shrink it"))


def _give_up_rights() -> None:
    if sys.platform == "win32":
        return
    import resource

    limits = {"RLIMIT_AS": _MEMORY, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 0}
    for name, value in limits.items():
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))
