"""Stop strings, against looking at the whole text after every character."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcv_runtime.choosing.stop_strings import StopStrings
from mcv_runtime.errors import OptionError


def naive(text, strings):
    """What is given out of `text`, and whether it was stopped."""
    for end in range(len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


LETTERS = st.text("abc猫", max_size=6)


@given(pieces=st.lists(LETTERS, max_size=12), strings=st.lists(LETTERS.filter(bool), max_size=4))
@example(pieces=["abc"], strings=["abcd", "bc"])
@example(pieces=["abcd"], strings=["abcd", "bc"])
@example(pieces=["aaab", "c"], strings=["aabc"])
def test_any_text_in_any_pieces(pieces, strings):
    stops = StopStrings(strings)
    given_out, text = "", ""
    for piece in pieces:
        given_out, text = given_out + stops.push(piece), text + piece
        wanted, stopped = naive(text, strings)
        assert stops.reached == stopped
        assert wanted.startswith(given_out)
        if stopped:
            assert given_out == wanted
        else:  # what waits is needed: with some more text it is a stop string
            waiting = text[len(given_out) :]
            assert not waiting or any(string.startswith(waiting) for string in strings)
    assert given_out + stops.finish() == naive(text, strings)[0]
    assert stops.finish() == ""


def test_across_pieces():
    stops = StopStrings(["\nUser:"])
    assert [stops.push(piece) for piece in ("A cat.", "\n", "\nUs", "er", ": no")] == ["A cat.", "", "\n", "", ""]
    assert stops.reached
    assert stops.push("more") == stops.finish() == ""


def test_nothing_waits_without_need():
    stops = StopStrings(["end"])
    assert [stops.push(piece) for piece in ("th", "e", " ene", "my")] == ["th", "", "e en", "emy"]
    assert not stops.reached


def test_one_string_is_one_string():
    assert StopStrings("ab").push("b a") == "b "


@pytest.mark.parametrize(("strings", "message"), [(["a", ""], "empty; leave it out"), ("", None), ([3], "not a string")])
def test_strings_that_make_no_sense(strings, message):
    with pytest.raises(OptionError, match=message):
        StopStrings(strings)
