"""The service in a process of its own, for clients that have an environment of theirs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served(python: str, *options: str) -> Iterator[str]:
    """Where `mcv-serve` of that Python listens, once it is ready."""
    command = [python, "-m", "mcv_serve.command", "--port", "0", "--threads", "1", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = ""
        for line in server.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                address = found[1]
            if "is ready" in line:
                break
        yield address
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()
