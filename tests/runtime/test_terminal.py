"""How commands end: by an error, or by a signal that unwinds what is under way."""

import io
import logging
import os
import signal
import sys
import threading

import pytest

from mcv_runtime.command import terminal
from mcv_runtime.errors import OptionError

ENDING = (signal.SIGTERM, signal.SIGHUP)


def ended(work):
    with pytest.raises(SystemExit) as raised:
        terminal.finish(work, "mcv", interrupted="interrupted")
    return raised.value.code


@pytest.mark.waits
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_unwinds_the_stack(number, capsys):
    seen = []

    def work():
        try:
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            except (Exception, KeyboardInterrupt):  # as whoever goes on after Ctrl-C
                seen.append("went on")
        finally:
            for again in ENDING:  # a second one does not cut short what is being put away
                os.kill(os.getpid(), again)
            seen.append("put away")

    assert ended(work) == 128 + number
    assert seen == ["put away"]
    assert capsys.readouterr().err == "mcv: interrupted\n"
    assert [signal.getsignal(each) for each in ENDING] == [signal.SIG_DFL, signal.SIG_DFL]


@pytest.mark.waits
@pytest.mark.parametrize("number", ENDING)
def test_a_host_keeps_its_own_handlers(number):
    for handler in (signal.SIG_IGN, lambda *_: None):  # nohup ignores SIGHUP
        signal.signal(number, handler)
        try:
            assert ended(lambda: os.kill(os.getpid(), number)) == 0
            assert signal.getsignal(number) is handler
        finally:
            signal.signal(number, signal.SIG_DFL)


@pytest.mark.waits
def test_another_thread_than_the_first_takes_no_signals():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(ended(lambda: 0)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_complaint_is_one_short_printable_line(capsys):
    def work():
        raise OptionError("\x1b[31m\n" + "a" * 1_000_000)

    assert ended(work) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(r"mcv: \x1b[31m\naaa") and printed.endswith("...\n")
    assert len(printed) < 2100 and printed[:-1].isprintable()


def test_what_a_library_logs_is_a_notice(capsys):
    def work():
        logging.getLogger("mcv_runtime.pictures").warning("%s has several pages\n\x1b[31m", "a.tif")
        logging.getLogger("somebody.else").error("something")
        logging.getLogger("mcv_runtime").info("detail")

    before = logging.getLogger().handlers[:]
    assert ended(work) == 0
    assert capsys.readouterr().err == "mcv: a.tif has several pages \\x1b[31m\nmcv: something\n"
    assert logging.getLogger().handlers == before


def test_a_notice_over_a_progress_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(terminal, "secure_streams", lambda: None)
    monkeypatch.setattr(sys, "stderr", screen)

    def work():
        screen.write("\rpictures 3 of 9 [####     ]")
        logging.getLogger("mcv_runtime").warning("short")

    assert ended(work) == 0
    assert screen.getvalue().split("\r")[-1] == "mcv: short".ljust(79) + "\n"
