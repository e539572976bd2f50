"""Options of another type than theirs, as a file or a form may bring them."""

import dataclasses
import threading
from typing import get_type_hints

import numpy as np
import pytest

from mcv_runtime import OptionError, Options, PictureOptions
from mcv_runtime.request.options import Keywords, PictureKeywords


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5, "temperature": 1, "top_p": 0.5, "logprobs": True, "seed": None, "stop": "x"},
        {"max_new_tokens": np.int64(5), "temperature": np.float32(1), "stop": ["x", "y"], "stop_token_ids": {1, 2}},
        {"stop_token_ids": np.arange(3), "early_stopping": "never", "cancel": threading.Event(), "progress": print},
        {"early_stopping": True, "json_schema": {"type": "object"}, "choices": ("a", "b"), "small_image_upsize": "never"},
        {"json_schema": "{}", "timeout": 3, "cancel": None, "progress": None, "regex": None, "use_image_id": False},
    ],
)
def test_what_fits(options):
    Options.of(None, options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, not '5'"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, not True"),
        ({"max_new_tokens": 5.0}, "max_new_tokens must be a whole number, not 5.0"),
        ({"temperature": False}, "temperature must be a number, not False"),
        ({"logprobs": 1}, "logprobs must be True or False, not 1"),
        ({"stop": b"x"}, "stop must be a text or a list of texts, not b'x'"),
        ({"stop": [1]}, "stop must be a text or a list of texts, not [1]"),
        ({"choices": "yes"}, "choices must be a list of texts, not 'yes'"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids must be a list of whole numbers, not [1, '2']"),
        ({"small_image_upsize": "sometimes"}, "small_image_upsize must be 'always' or 'never' or 'adaptive', not 'sometimes'"),
        ({"cancel": True}, "cancel must be a threading.Event, not True"),
        ({"regex": "x" * 99, "json_schema": ["x" * 99]}, f"json_schema must be a text or a mapping, not ['{'x' * 55}..."),
        ({"tempurature": 1}, "there is no option 'tempurature' here; did you mean temperature?"),
        ({"max_tokens": 1}, "there is no option 'max_tokens' here; did you mean max_new_tokens?"),
        ({"nonsense": 1}, "there is no option 'nonsense' here"),
        ({5: 1}, "there is no option 5 here"),
    ],
)
def test_what_does_not(options, line):
    with pytest.raises(OptionError) as caught:
        Options.of(None, options)
    assert str(caught.value) == line


def test_every_option_has_a_name_for_its_type():
    class Nothing:
        pass

    for field in dataclasses.fields(Options):
        with pytest.raises(OptionError, match=f"^{field.name} must be "):
            Options(**{field.name: Nothing()})


def test_options_are_the_same_as_keywords():
    """Editors and type checkers take the names and types of keywords from a `TypedDict`."""
    for options, keywords in ((PictureOptions, PictureKeywords), (Options, Keywords)):
        fields = {field.name for field in dataclasses.fields(options)}
        hints = get_type_hints(options)
        assert get_type_hints(keywords) == {name: hints[name] for name in fields}


def test_changes_and_what_was_given():
    options = Options(temperature=0.5, stop=["x"])
    assert Options.of(options, {"temperature": 1.0}) == Options(temperature=1.0, stop=["x"])
    assert options.given() == {"temperature": 0.5, "stop": ["x"]}
    assert PictureOptions.of(None, {"max_slice_nums": 2}).given() == {"max_slice_nums": 2}
    with pytest.raises(OptionError, match="there is no option 'temperature' here"):
        PictureOptions.of(options, {})
