"""A bar on a terminal, and nothing of it anywhere else or afterwards."""

import io

import pytest

from mcv_runtime import Event
from mcv_runtime.command.progress_bar import ProgressBar, print_answer

pytestmark = pytest.mark.waits


class Screen(io.StringIO):
    """A terminal of one line: what is on it now."""

    def isatty(self):
        return True

    @property
    def line(self):
        shown = []
        for piece in self.getvalue().split("\r"):
            shown[: len(piece)] = piece
        return "".join(shown).rstrip()


@pytest.fixture
def clock():
    """Time that passes by one second whenever somebody looks."""
    seconds = iter(range(1000))
    return lambda: next(seconds)


def test_what_is_shown(clock):
    screen = Screen()
    bar = ProgressBar(screen, clock)
    shown = []
    for event in [
        Event("pictures", 1, 3),
        Event("slices", 4, 12),
        Event("prompt", 512, 2048),
        Event("answer", 7, 64),
    ]:
        bar(event)
        shown.append(screen.line)
    assert shown == [
        "",
        "pictures 1 of 3, slices 4 of 12 [########                ]",
        "reading 512 of 2,048 tokens [######                  ]",
        "answering, 7 tokens",
    ]
    bar.clear()
    assert screen.line == ""
    bar(Event("prompt", 1, 1))
    assert screen.line == "reading 1 of 1 tokens [########################]"
    bar.close()
    bar(Event("prompt", 1, 1))
    assert screen.line == ""
    assert "\n" not in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


@pytest.mark.parametrize("columns", [10, 30, 40, 200])
def test_a_narrow_terminal(clock, columns, monkeypatch):
    monkeypatch.setattr("mcv_runtime.command.progress_bar.columns", lambda stream: columns)
    screen = Screen()
    bar = ProgressBar(screen, clock)
    for done in range(0, 2049, 512):
        bar(Event("prompt", done, 2048))
        assert screen.line.startswith("reading"[:columns])
        assert len(screen.line) < columns


def test_no_bar_before_it_is_worth_one_and_none_without_a_terminal():
    screen, pipe = Screen(), io.StringIO()
    still = ProgressBar(screen, lambda: 5.0)
    ProgressBar(pipe, iter(range(99)).__next__)(Event("prompt", 1, 2))
    still(Event("prompt", 1, 2))
    assert (screen.getvalue(), pipe.getvalue()) == ("", "")


def test_it_is_gone_before_the_answer(clock, monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    bar = ProgressBar(screen, clock)

    def pieces():
        bar(Event("prompt", 1, 2))
        assert "reading" in screen.line
        yield "HEL"
        assert screen.line == "HEL"
        bar(Event("answer", 1, 0))
        yield "LO"
        return "the answer"

    assert print_answer(pieces(), bar) == "the answer"
    assert screen.getvalue().endswith("\rHELLO\n")


def test_it_is_gone_before_an_error(clock, monkeypatch):
    screen = Screen()

    def pieces():
        bar(Event("prompt", 1, 2))
        yield ""
        raise ValueError

    bar = ProgressBar(screen, clock)
    with pytest.raises(ValueError):
        print_answer(pieces(), bar)
    assert screen.line == ""
