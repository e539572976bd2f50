"""`mcv-run --chat`, over a pipe and in a terminal."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mcv_runtime.command import chat_cli
from mcv_runtime.command.chat_cli import completions

pytestmark = pytest.mark.waits
DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
RUN = [sys.executable, "-m", "mcv_runtime.command.cli"]
RUN_IN_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from mcv_runtime.command.cli import main
main()
"""
LIMIT_S = 600
"""No busy machine takes so long to show something; a fault then ends with what was shown instead."""
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
        "/video .",
        "/image ~nobody/one.png 'unbalanced",
        "/image one.png",
        TEXT,
    )
    assert done.stdout == "HELLO\n"
    assert done.returncode == 1
    words = [
        "nothing.png cannot be read", "broken.png is not a picture", "name a file", "no command /nonsense",
        "nothing.mcv is not there", "cannot be written", "cannot be written", "no point",
        "nothing.mp4 cannot be read", ". is a folder, not a file", "cannot be read",
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


def test_ctrl_c_at_any_line_ends_nothing(monkeypatch):
    """Pressed before a line of the loop runs, for each of its lines, and again while that is answered."""

    class Screen(io.StringIO):
        def write(self, text):
            signal.raise_signal(signal.SIGINT)

    class Keys(io.StringIO):
        def isatty(self):
            return True

    def enter(prompt):
        if not typed:
            raise EOFError
        return typed.pop()

    def outside(number, frame):
        raise AssertionError("nobody presses it there")

    def press(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != chat_cli.__file__:
            return None
        if event == "line" and signal.getsignal(signal.SIGINT) is not outside:
            lines += 1
            if lines == line:
                signal.raise_signal(signal.SIGINT)
        return press

    monkeypatch.setattr("builtins.input", enter)
    monkeypatch.setitem(sys.modules, "readline", None)  # its settings are the process's
    monkeypatch.setattr("sys.stdin", Keys())
    monkeypatch.setattr("sys.stderr", Screen())
    lines = line = 0
    usual = signal.signal(signal.SIGINT, outside)
    try:
        while lines >= line:
            lines, line, typed = 0, line + 1, ["one", "two"]
            tracing = sys.gettrace()
            sys.settrace(press)
            try:
                heard = list(chat_cli.chat_lines())
            except KeyboardInterrupt:
                pytest.fail(f"Ctrl-C before the {line}th line that ran has ended the conversation")
            finally:
                sys.settrace(tracing)
            assert heard
            assert signal.getsignal(signal.SIGINT) is outside
    finally:
        signal.signal(signal.SIGINT, usual)
    assert line > 20


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
                [sys.executable, "-c", RUN_IN_TERMINAL, "--chat", *map(str, arguments)],
                stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment(TERM="xterm", COLUMNS="80", **more),
                start_new_session=True,
            )  # fmt: skip
            os.close(slave)  # so that there is no more to read once the program has ended
            opened.append(process)
            return Typist(master, process)

        yield start
        for process in opened:
            process.kill()
            process.wait()
        os.close(master)

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
        typist.interrupt("\x03")
        typist.wait("> ")
        typist.type("\x1b[A", "/help")  # history
        typist.type("\x15", "")
        typist.type("\x04", "")
        assert typist.process.wait() == 0

    def test_ctrl_c_pressed_many_times_ends_nothing(self, terminal):
        typist = terminal("--image", "one.png")
        typist.wait("> ")
        for _ in range(20):
            typist.interrupt("\x03\x03\x03")
        typist.interrupt("\x03")  # one alone: nothing is left of those before
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
        assert typist.process.wait() == 0


class Typist:
    """Somebody at a terminal, who waits for what he expects to see."""

    def __init__(self, master, process):
        self._master, self.process, self._unread = master, process, ""

    def wait(self, pattern):
        """What is shown up to and with `pattern`."""
        while not (found := re.search(pattern, self._unread)):
            assert self._read(LIMIT_S), f"{pattern!r} was not shown, but {self._unread[-500:]!r}"
        shown, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return shown

    def type(self, keys, expected):
        """What is shown from now on up to `expected`."""
        os.write(self._master, keys.encode())
        return self.wait(re.escape(expected))

    def interrupt(self, keys):
        """Press Ctrl-C, as `keys`, when the program waits for a key: Python misses a signal that comes just before it does."""
        while not self._asleep() or self._read(0):
            self._read(0.01)
        self._unread = ""
        self.type(keys, "Ctrl-D leaves")

    def _read(self, seconds):
        """Whether there was something to read."""
        import select

        ready, _, _ = select.select([self._master], [], [], seconds)
        try:
            more = os.read(self._master, 4096) if ready else b""
        except OSError:  # the program has ended (Linux; elsewhere there is just no more)
            more = b""
        self._unread += more.decode(errors="replace")
        return bool(more)

    def _asleep(self):
        """Where the system says it."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "SZ"
