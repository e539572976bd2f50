"""A peer's process, from outside: started, asked, held still while others are measured, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PATIENCE_S = 900
"""Longer than any answer takes: then the process is ended."""


class WorkerError(RuntimeError):
    """What a peer's process could not do, in one line."""


class Worker:
    """A process that loads once and is asked many times."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            self.load_s = float(self._answer()["load"])
            self._answer()  # warm
        except WorkerError:
            self.close()
            raise
        self._hold()

    def ask(self, measure: str) -> dict[str, float]:
        """Seconds by what was measured; nobody else runs meanwhile."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"measure": measure}) + "\n")
            self._process.stdin.flush()
            return self._answer()
        except OSError as error:
            raise WorkerError(_last_line(self._log)) from error
        finally:
            self._hold()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _hold(self) -> None:
        """Threads of a pool that wait by spinning would take time from the others."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watch = threading.Timer(PATIENCE_S, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise WorkerError(_last_line(self._log))
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_once(command: list[str], log: Path) -> tuple[float, float]:
    """Run a process to its line of JSON: seconds from its start to that line, and its largest memory in MB at its end."""
    start = time.perf_counter()
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    took = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode or not line:
        raise WorkerError(_last_line(log))
    return took, usage.ru_maxrss / 1000


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip()[:300]} ({log})" if lines else f"it ended without a word ({log})"
