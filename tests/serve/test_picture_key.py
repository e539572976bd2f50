"""Which picture a request is about, told without parsing it."""

import importlib.util
import json
import subprocess
import sys

import pytest
from tiny_server import about_demo, text_chat

from mcv_serve.picture_key import picture_key


def key(body):
    return picture_key(json.dumps(body).encode())


def test_equal_pictures_have_equal_keys_in_each_dialect():
    first = key(about_demo())
    assert len(first) == 32
    assert key(about_demo("Another question?")) == first
    assert key(about_demo(url="data:image/png;base64,AAAA")) != first
    assert key(text_chat("What is data?")) == ""
    assert key({"prompt": "What?", "images": ["AAAA", "BBBB"]}) == key(about_demo(url="data:image/png;base64,AAAA"))
    assert key(about_demo(url="https://a.example/b.png")) not in ("", first)


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b'"url": "', b"data:;base64,", b'{"images": [""]}', b"data:" * 10_000])
def test_whatever_a_body_holds_it_is_no_error(body):
    assert picture_key(body) == ""


@pytest.mark.waits
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray here: pip install '.[ray]'")
def test_arguments_that_ray_s_application_does_not_know():
    code = (
        "from mcv_serve.ray_app import build\nfrom mcv_runtime import OptionError\n"
        "for wrong in ({'colour': 'red'}, {'threads': 'many'}):\n"
        "    try:\n        build(wrong)\n    except OptionError as error:\n        print(error)\n"
        "print(type(build({'threads': '1'})).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second, third = done.stdout.splitlines()
    assert "colour" in first and "whole numbers" in second
    assert third == "Application"
