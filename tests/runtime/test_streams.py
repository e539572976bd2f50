"""Commands whose standard streams are closed, full, or left by whoever read them: an answer or one line, never a traceback."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mcv_runtime import OutputError
from mcv_runtime.command.streams import is_closed, secure_streams

pytestmark = [pytest.mark.waits, pytest.mark.skipif(sys.platform == "win32", reason="/dev/full, and a POSIX shell")]
DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
BUNDLE = Path(__file__).parents[2] / "runtime" / "mcv_runtime" / "default_bundle"
FULL = "stdout cannot be written: No space left on device\n"
ASK = ["run", "--image", str(DEMO), "-p", "What does the text say?", "-t", "1"]
MODULES = {"run": "mcv_runtime.command.cli", "export": "mcv_export.cli"}


def run(command, streams, **environment):
    """Exit code, stdout and stderr of a command whose streams the shell changes first."""
    name, *arguments = command
    program = [sys.executable, "-c", f"from {MODULES[name]} import main; main()", *arguments]
    shell = ["sh", "-c", f'exec "$@" {streams}', "sh", *program]
    environment = {**os.environ, "COLUMNS": "80", **environment}
    done = subprocess.run(shell, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "streams", "code", "stdout", "stderr"),
    [
        (ASK, ">&-", 2, "", "mcv-run: stdout is closed, so that no answer can be given; leave it open\n"),
        (ASK, "2>&-", 0, "HELLO\n", ""),
        (ASK, "2>/dev/full", 0, "HELLO\n", ""),
        (ASK, "<&- 2>&-", 0, "HELLO\n", ""),
        (ASK, ">/dev/full", 2, "", f"mcv-run: {FULL}"),
        ([*ASK, "--json"], ">/dev/full", 2, "", f"mcv-run: {FULL}"),
        (["run", "--help"], ">/dev/full", 2, "", f"mcv-run: {FULL}"),
        (["run", "--nonsense"], "2>/dev/full", 2, "", ""),
        (["run", "--version"], ">&- 2>&- <&-", 0, "", ""),
        (["export", "--help"], ">/dev/full", 2, "", f"mcv-export: {FULL}"),
        (["export", "inspect", str(BUNDLE)], ">&-", 0, "", ""),
        (["export", "inspect", str(BUNDLE)], ">/dev/full", 2, "", f"mcv-export: {FULL}"),
    ],
)  # fmt: skip
def test_closed_and_full_streams(command, streams, code, stdout, stderr):
    assert run(command, streams, MCV_BUNDLE=str(BUNDLE)) == (code, stdout, stderr)


def test_a_conversation_without_stdin_or_with_half_a_character(tmp_path):
    code, answer, notices = run(["run", "--chat"], "<&-")
    assert (code, answer, notices.count("\n")) == (0, "", 1)  # that this is the demo model
    (tmp_path / "asked").write_bytes(b"What\xff?\n")
    code, answer, notices = run(["run", "--chat", "-n", "2"], f"<{tmp_path}/asked")
    assert (code, answer[-1:], notices.count("\n")) == (0, "\n", 1)


def test_a_batch_needs_none_of_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": str(DEMO), "prompt": "What does the text say?"}))
    out = tmp_path / "out.jsonl"
    assert run(["run", "--batch", str(tmp_path / "rows.jsonl"), "--out", str(out)], ">&- 2>&- <&-") == (0, "", "")
    assert json.loads(out.read_text())["answer"] == "HELLO"


@pytest.mark.parametrize("command", [["run", "--help"], ["export", "inspect", str(BUNDLE)]], ids=["help", "inspect"])
def test_a_reader_that_has_left(command):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        name, *arguments = command
        program = [sys.executable, "-c", f"from {MODULES[name]} import main; main()", *arguments]
        done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path):
    """What a library prints would go into them."""
    code = """
import os, sys
from mcv_runtime.command.streams import is_closed, secure_streams
secure_streams()
with open(sys.argv[1], "w") as file:
    os.write(1, b"printed by a library")
    os.write(2, b"printed by a library")
    file.write(f"{file.fileno() > 2} {is_closed(sys.stdout)} {is_closed(sys.stderr)} {sys.stdin.read()!r}")
"""
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(tmp_path / "out")], check=True)
    assert (tmp_path / "out").read_text() == "True True True ''"


@pytest.fixture
def secured(monkeypatch):
    """A function that makes a file, or what its number stands for, this process's stdout and stderr."""

    def secure(target):
        opened = [open(target, "a", encoding="ascii", closefd=not isinstance(target, int)) for _ in range(2)]  # noqa: SIM115
        monkeypatch.setattr(sys, "stdin", sys.stdin)
        monkeypatch.setattr(sys, "stdout", opened[0])
        monkeypatch.setattr(sys, "stderr", opened[1])
        secure_streams()
        return opened

    return secure


def test_only_what_is_on_stdout_counts(secured):
    kept = secured("/dev/full")
    assert not is_closed(sys.stdout)
    print("a notice", file=sys.stderr, flush=True)
    for _ in range(2):
        with pytest.raises(OutputError, match="No space left"):
            print("an answer")
    sys.stdout.flush()
    for file in kept:
        file.close()  # nothing waits in them


def test_characters_that_a_stream_lacks(secured, tmp_path):
    kept = secured(tmp_path / "out")
    print("é\udcff")
    print("é", file=sys.stderr)
    for file in kept:
        file.close()
    assert (tmp_path / "out").read_bytes() == b"??\n\\xe9\n"


def test_a_pipe_that_does_not_wait(secured):
    """As a parent in Node.js leaves it; everything arrives all the same."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    kept = secured(writer)
    arrived = []

    def read():
        while block := os.read(reader, 1 << 16):
            arrived.append(block)

    thread = threading.Thread(target=read)
    thread.start()
    print("x" * 1_000_000)
    for file in kept:
        file.close()
    os.close(writer)
    thread.join()
    os.close(reader)
    assert b"".join(arrived) == b"x" * 1_000_000 + b"\n"
