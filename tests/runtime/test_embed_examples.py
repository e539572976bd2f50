"""The README's examples run as they stand, on the model that ships, and print what their comments say."""

import dataclasses
import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

import mcv_runtime

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Embed it$(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
STATED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture of a red circle and HELLO, and one of the word STOP on dark paper."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.open(ROOT / "models" / "tiny" / "demo.png").save(folder / "photo.jpg", quality=95)
    dark = Image.new("RGB", (112, 112), (30, 30, 40))
    draw = ImageDraw.Draw(dark)
    for place, letter in enumerate("STOP"):
        draw.text((22 + 18 * place, 46), letter, fill=(250, 250, 250), font=ImageFont.load_default(20))
    dark.save(folder / "dark.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def session():
    """One after the other, as somebody would type them."""
    return {}


def test_there_is_one_for_every_feature():
    for word in (
        "stream", "temperature", "num_beams", "num_return_sequences", "stop=", "timeout", "cancel", "logprobs", "prompt_lookup",
        "json_schema", "choices", "Options(", "submit", "await", "info()", "memory()",
        "chat(", "fork", "save", "load_chat", "batch", "encode_image", "encode_video", "progress",
        "SessionOptions", "session_factory",
    ):  # fmt: skip
        assert any(word in block for block in BLOCKS), word
    assert set(re.findall(r"^from mcv_runtime import (.*)$", "".join(BLOCKS), re.MULTILINE)) == {
        "load", "Request, Video", "McvError", "Options"
    }  # fmt: skip


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, folder, session, monkeypatch, capsys):
    block = BLOCKS[number]
    if "json_schema" in block:
        pytest.importorskip("llguidance")
    monkeypatch.chdir(folder)
    exec(compile(block, f"README.md, example {number + 1}", "exec"), session)
    printed = capsys.readouterr().out
    stated = STATED.findall(block)
    assert [line.rstrip() for line in printed.splitlines()] == stated
    assert len(stated) >= 1


def test_names_of_the_text_are_real():
    prose = re.sub(r"^```.*?^```$", "", SECTION, flags=re.MULTILINE | re.DOTALL)
    known = {
        *mcv_runtime.__all__,
        *(field.name for field in dataclasses.fields(mcv_runtime.Options)),
        *mcv_runtime.load.__annotations__,
    }
    known |= {*dir(mcv_runtime.Answer), "None", "load", "engine.ask_messages", "mcv_runtime.__all__", "onnxruntime", "openvino"}
    for name in re.findall(r"`([a-z_.A-Z]+)`", prose):
        assert name in known, name
    assert hasattr(mcv_runtime.Engine, "ask_messages")
