"""`mcv-run --chat`: a conversation in a terminal, or over a pipe with one question a line."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mcv_runtime.command.progress_bar import ProgressBar, print_answer
from mcv_runtime.conversation.chat import Chat
from mcv_runtime.documents.document import Document, is_pdf
from mcv_runtime.engine import Engine
from mcv_runtime.errors import McvError, OptionError
from mcv_runtime.files import at_home
from mcv_runtime.pictures.images import MAX_PIXELS, open_local, open_picture
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.answer import Answer
from mcv_runtime.request.options import Options

FAILED = 1
_PROMPT = "> "
_COMMANDS = ("/image", "/video", "/reset", "/fork", "/back", "/save", "/load", "/help", "/quit")
_HELP = """\
/image PATH...  pictures for your next question
/video PATH...  videos for your next question
/reset          forget the conversation
/fork           remember this point of it
/back           return to the point that was remembered last
/save PATH      write the conversation to a file
/load PATH      go on with one that was saved
/help           this list
/quit           leave, as Ctrl-D does
Ctrl-C stops an answer. A question that begins with / needs a space before it."""


class Leave(Exception):  # noqa: N818 - not an error
    """The conversation is over."""


class TerminalChat:
    """Reads lines until there are no more: questions, which it answers, and commands."""

    def __init__(self, engine: Engine, *, system: str | None, options: Options, max_pixels: int = MAX_PIXELS) -> None:
        self._engine, self._options, self._max_pixels = engine, options, max_pixels
        self._chat = engine.chat(system=system, options=options)
        self._points: list[Chat] = []
        self._waiting: list[Path | Document | Video] = []
        self._failed = False

    def show(self, pictures: Sequence[Path | Document | Video]) -> None:
        """Pictures, documents and videos for the next question; raises `ImageError` for those that cannot be opened."""
        for picture in pictures:
            document = Document(picture) if isinstance(picture, Path) and is_pdf(picture) else picture
            if isinstance(document, Document):
                for page in document.open(self._max_pixels):
                    page.size(self._max_pixels)
            elif isinstance(picture, Path):
                open_picture(picture, self._max_pixels)
            else:
                open_local(str(picture.source)).close()
        self._waiting += pictures

    def run(self, lines: Iterator[str]) -> int:
        """Hold the conversation; 0, or 1 if something of it failed that nobody was there to see."""
        try:
            for line in lines:
                try:
                    self.take(line)
                except McvError as error:
                    self._failed = True
                    _notice(f"mcv-run: {error}")
        except Leave:
            pass
        return FAILED if self._failed and not sys.stdin.isatty() else 0

    def take(self, line: str) -> None:
        """Do what a line says."""
        if line.startswith("/"):
            name, _, rest = line.strip().partition(" ")
            if name not in _COMMANDS:
                raise OptionError(f"there is no command {name}; /help lists them")
            command: Callable[[str], None] = getattr(self, f"_{name[1:]}")
            command(rest.strip())
        elif line.strip():
            self._answer(line.strip())

    def _answer(self, question: str) -> None:
        waiting, self._waiting = self._waiting, []
        bar = ProgressBar(sys.stderr)
        cancel = threading.Event()
        with _on_ctrl_c(lambda *_: cancel.set()):
            pieces = self._chat.stream(waiting, question, cancel=cancel, progress=bar)
            answer = print_answer(pieces, bar)
        if not answer.tokens:  # then there was no turn
            self._waiting = waiting
        _remark(_figures(answer))

    def _image(self, rest: str) -> None:
        self._put([Path(path) for path in _paths(rest, "/image photo.jpg")])

    def _video(self, rest: str) -> None:
        self._put([Video(path) for path in _paths(rest, "/video clip.mp4")])

    def _put(self, pictures: Sequence[Path | Document | Video]) -> None:
        self.show(pictures)
        names = [Path(picture.name).name for picture in self._waiting]
        _remark(f"{', '.join(names)}: with your next question")

    def _reset(self, rest: str) -> None:
        self._chat.reset()
        self._waiting = []
        _remark("the conversation is forgotten")

    def _fork(self, rest: str) -> None:
        self._points.append(self._chat.fork())
        _remark("/back returns to here")

    def _back(self, rest: str) -> None:
        if not self._points:
            raise OptionError("there is no point to return to; /fork remembers one")
        self._chat = self._points.pop()
        self._tell_where()

    def _save(self, rest: str) -> None:
        (path,) = _paths(rest, "/save chat.mcv", most=1)
        self._chat.save(path)
        _remark(f"saved; `/load {path}` goes on from here")

    def _load(self, rest: str) -> None:
        (path,) = _paths(rest, "/load chat.mcv", most=1)
        self._chat = self._engine.load_chat(path, options=self._options)
        self._tell_where()

    def _help(self, rest: str) -> None:
        _notice(_HELP)

    def _quit(self, rest: str) -> None:
        raise Leave

    def _tell_where(self) -> None:
        asked = [message for message in self._chat.messages if message.role == "user"]
        if not asked:
            _remark("nothing was asked yet")
            return
        last = " ".join(part for part in asked[-1].parts if isinstance(part, str))
        _remark(f"{len(asked)} questions so far, the last: {last}")


def chat_lines() -> Iterator[str]:
    """The lines that somebody types, with editing and history where there is readline; or those of a pipe."""
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except OSError as error:
            raise OptionError(f"stdin cannot be read: {error.strerror}") from None
        return
    try:
        import readline
    except ImportError:  # Windows
        pass
    else:
        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims("\n")
        readline.set_completer(lambda text, number: dict(enumerate(completions(text))).get(number))
    reading = False

    def give_up_line(number: int, frame: FrameType | None) -> None:
        nonlocal reading
        if reading:
            reading = False  # pressed once too often, it ends nothing
            raise KeyboardInterrupt

    with _on_ctrl_c(give_up_line):
        while True:
            try:
                try:
                    reading = True
                    line = input(_PROMPT)
                finally:
                    reading = False
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                _notice("\nCtrl-D leaves")
            else:
                yield line


def completions(line: str) -> list[str]:
    """What a line that begins with a command, or with a command and part of a path, may become."""
    name, space, typed = line.partition(" ")
    if not space:
        return [f"{command} " for command in _COMMANDS if line and command.startswith(line)]
    if name not in ("/image", "/video", "/save", "/load"):
        return []
    folder = at_home(typed if typed.endswith("/") else str(Path(typed).parent))
    beginning = typed[: typed.rfind("/") + 1]
    try:
        found = sorted(f"{beginning}{entry.name}{'/' * entry.is_dir()}" for entry in folder.iterdir())
    except OSError:
        return []
    return [f"{name} {path}" for path in found if path.startswith(typed)]


@contextmanager
def _on_ctrl_c(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """What Ctrl-C does, instead of ending the program in the middle of something."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _paths(rest: str, example: str, most: int | None = None) -> list[Path]:
    """The files that a command names; quotes and backslashes keep a space inside of a name, and so does being there."""
    if not rest:
        raise OptionError(f"name a file, for example {example}")
    if not (whole := at_home(rest)).exists():
        with suppress(ValueError):  # a quote without its other one
            parts = shlex.split(rest)
            if most is None or len(parts) == most:
                return [at_home(part) for part in parts]
    return [whole]


def _figures(answer: Answer) -> str:
    speed = "" if answer.tokens_per_s is None else f", {answer.tokens_per_s:.1f} a second"
    ends = {
        "stop": "",
        "length": "; it may go on",
        "repetition": "; it went round in circles",
        "timeout": "; the time is up",
        "cancelled": "; stopped",
    }
    reused = f"{answer.reused_tokens:,} of {len(answer.prompt_tokens):,} prompt tokens were known"
    return f"{len(answer.tokens):,} tokens{speed}; {reused}{ends[answer.stop_reason]}"


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _remark(text: str) -> None:
    """Something that only a person wants to know: dim where a terminal can do that."""
    if sys.stderr.isatty():
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
        _notice(text if plain else f"\x1b[2m{text}\x1b[0m")
