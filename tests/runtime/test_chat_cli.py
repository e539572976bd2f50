"""`mcv-run --chat`, over a pipe and in a terminal."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcv_runtime.command.chat_cli import completions

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
RUN = [sys.executable, "-m", "mcv_runtime.command.cli"]
TEXT = "What does the text say?"


@pytest.fixture
def folder(tmp_path):
    shutil.copy(DEMO, tmp_path / "one.png")
    shutil.copy(DEMO, tmp_path / "two words.png")
    (tmp_path / "broken.png").write_text("no picture")
    return tmp_path


def environment(**given):
    return {name: value for name, value in os.environ.items() if name not in ("MCV_BUNDLE", "NO_COLOR")} | given


def talk(folder, *lines, arguments=()):
    return subprocess.run(
        [*RUN, "--chat", "-t", "1", *map(str, arguments)],
        input="".join(f"{line}\n" for line in lines),
        cwd=folder,
        env=environment(HOME=str(folder)),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def complaints(done):
    return [line for line in done.stderr.splitlines() if "demo model" not in line]


def test_one_question_a_line_over_a_pipe(folder):
    done = talk(folder, TEXT, "", "Describe the picture.", arguments=["--image", "one.png"])
    assert (done.returncode, complaints(done)) == (0, [])
    assert done.stdout == "HELLO\na red circle and the text HELLO\n"


def test_a_first_question_from_the_command_line(folder):
    done = talk(folder, "Describe the picture.", arguments=["--image", "one.png", "-p", TEXT])
    assert done.stdout == "HELLO\na red circle and the text HELLO\n"


@pytest.mark.parametrize("named", ["two words.png", "'two words.png'", "two\\ words.png", "~/one.png", '"~/two words.png"'])
def test_pictures(folder, named):
    done = talk(folder, f"/image {named}", TEXT)
    assert (done.returncode, done.stdout, complaints(done)) == (0, "HELLO\n", [])


def test_several_pictures_for_one_question(folder):
    together = talk(folder, "/image one.png 'two words.png'", "Which picture has text?")
    one_by_one = talk(folder, "/image one.png", "/image two words.png", "Which picture has text?")
    command_line = talk(folder, "Which picture has text?", arguments=["--image", "one.png", "--image", "two words.png"])
    assert together.stdout == one_by_one.stdout == command_line.stdout
    assert together.stdout.strip()


def test_a_mistake_is_one_line_and_the_conversation_goes_on(folder):
    done = talk(
        folder,
        "/image nothing.png",
        "/image broken.png",
        "/image",
        "/nonsense",
        "/load nothing.mcv",
        "/save nowhere/chat.mcv",
        "/save nul\0.mcv",
        "/back",
        "/video nothing.mp4",
        "/image ~nobody/one.png 'unbalanced",
        "/image one.png",
        TEXT,
    )
    assert done.stdout == "HELLO\n"
    assert done.returncode == 1
    words = [
        "nothing.png cannot be read", "broken.png is not a picture", "name a file", "no command /nonsense",
        "nothing.mcv cannot be read", "cannot be written", "cannot be written", "no point",
        "nothing.mp4 cannot be read", "cannot be read",
    ]  # fmt: skip
    assert len(complaints(done)) == len(words)
    for line, said in zip(complaints(done), words, strict=True):
        assert line.startswith("mcv-run: ")
        assert said in line


def test_saved_forked_and_forgotten(folder):
    first = talk(
        folder, "/image one.png", TEXT, "/fork", "/reset", "/back", "Describe the picture.", "/save c d.mcv", "/quit", "x"
    )
    assert (first.returncode, first.stdout, complaints(first)) == (0, "HELLO\na red circle and the text HELLO\n", [])
    second = talk(folder, "/load c d.mcv", "What shape is this?")
    whole = talk(folder, "/image one.png", TEXT, "Describe the picture.", "What shape is this?")
    assert (second.returncode, complaints(second)) == (0, [])
    assert second.stdout == whole.stdout.splitlines(keepends=True)[-1]


def test_a_question_may_begin_with_a_slash_after_a_space(folder):
    done = talk(folder, "/image one.png", f" /{TEXT}")
    assert (done.returncode, complaints(done)) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "nothing.png"], "nothing.png cannot be read"),
        (["--json"], "--json"),
        (["--num-return-sequences", "2", "--temp", "1"], "--num-return-sequences"),
        (["--batch", "one.png"], "--batch"),
        (["--out", "x"], "--batch"),
        (["--logprobs"], "--json"),
    ],
)
def test_mistakes_on_the_command_line(folder, arguments, words):
    done = talk(folder, TEXT, arguments=arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def test_completion(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert completions("/im") == ["/image "]
    assert completions("What") == []
    assert completions("") == []
    assert completions("/image t") == ["/image two words.png"]
    assert completions(f"/image {folder}/o") == [f"/image {folder}/one.png"]
    assert completions("/image nowhere/x") == []
    assert completions("/reset x") == []
    monkeypatch.setenv("HOME", str(folder))
    assert completions("/save ~/br") == ["/save ~/broken.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
class TestTerminal:
    """Typed into a terminal of 80 columns."""

    @pytest.fixture
    def terminal(self, folder):
        import pty

        master, slave = pty.openpty()
        opened = []

        def start(*arguments, **more):
            process = subprocess.Popen(
                [*RUN, "--chat", *map(str, arguments)],
                stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment(TERM="xterm", COLUMNS="80", **more),
                start_new_session=True, preexec_fn=_take_terminal,
            )  # fmt: skip
            opened.append(process)
            return Typist(master, process)

        yield start
        for process in opened:
            process.kill()
            process.wait()
        os.close(master)
        os.close(slave)

    def test_a_conversation(self, terminal):
        typist = terminal("--image", "one.png")
        typist.wait("> ")
        shown = typist.type(f"{TEXT}\r", "known")
        assert "HELLO\r\n" in shown
        assert "\x1b[2m6 tokens" in shown  # dim
        typist.wait("> ")
        typist.type("/image tw\t", "two words.png")
        typist.type("\r", "with your next question")
        typist.wait("> ")
        typist.type("/nope\r", "mcv-run: there is no command /nope; /help lists them\r\n")
        typist.wait("> ")
        typist.type("/help\r", "Ctrl-C stops an answer")
        typist.wait("> ")
        typist.type("half a question", "half a question")
        typist.press_until("\x03", "Ctrl-D leaves")
        typist.wait("> ")
        typist.type("\x1b[A", "/help")  # history
        typist.type("\x15", "")
        typist.type("\x04", "")
        assert typist.process.wait(60) == 0

    def test_ctrl_c_pressed_many_times_ends_nothing(self, terminal):
        typist = terminal("--image", "one.png")
        typist.wait("> ")
        for _ in range(20):
            typist.press_until("\x03\x03\x03", "Ctrl-D leaves")
        typist.wait("> ")
        typist.type(f"{TEXT}\r", "HELLO\r\n")

    def test_without_colours(self, terminal):
        typist = terminal("--image", "one.png", NO_COLOR="1")
        typist.wait("> ")
        assert "\x1b[2m" not in typist.type(f"{TEXT}\r", "known")

    def test_ctrl_c_stops_an_answer_and_nothing_else(self, terminal, golden_bundle):
        typist = terminal("-m", golden_bundle, "-n", 30_000, "--regex", "[a-z ]{20000}")
        typist.wait("> ")
        typist.type("hello\r", "hello\r\n")
        typist.wait(r"[a-z ]{4}")
        typist.type("\x03", "stopped")
        typist.wait("> ")
        typist.type("go on\r", "go on\r\n")
        typist.wait(r"[a-z ]{4}")
        typist.type("\x03", "stopped")
        typist.wait("> ")
        typist.type("\x04", "")
        assert typist.process.wait(60) == 0


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Typist:
    """Somebody at a terminal, who waits for what he expects to see."""

    def __init__(self, master, process):
        self._master, self.process, self._unread = master, process, ""

    def wait(self, pattern, seconds=60):
        """What is shown up to and with `pattern`."""
        shown = self._shown(pattern, seconds)
        assert shown is not None, f"{pattern!r} was not shown, but {self._unread[-500:]!r}"
        return shown

    def press_until(self, keys, expected):
        """Like `type`, but again and again: Python misses a signal that comes just before it waits for the next key."""
        for _ in range(30):
            os.write(self._master, keys.encode())
            if self._shown(re.escape(expected), 2):
                return
        raise AssertionError(f"{expected!r} was not shown, but {self._unread[-500:]!r}")

    def _shown(self, pattern, seconds):
        import select

        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self._unread)):
            ready, _, _ = select.select([self._master], [], [], max(until - time.monotonic(), 0))
            if not ready:
                return None
            self._unread += os.read(self._master, 4096).decode(errors="replace")
        shown, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return shown

    def type(self, keys, expected):
        """What is shown from now on up to `expected`."""
        os.write(self._master, keys.encode())
        return self.wait(re.escape(expected))
