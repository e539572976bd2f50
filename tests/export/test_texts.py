"""Chat templates from every place where transformers keeps them, in its order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcv_export.checkpoint import open_checkpoint
from mcv_export.families import recognise
from mcv_runtime.errors import CheckpointError

PLACES: dict[str, tuple[str, Callable[[str], object]]] = {
    "jinja": ("chat_template.jinja", lambda text: text),
    "json": ("chat_template.json", lambda text: {"chat_template": text}),
    "processor": ("processor_config.json", lambda text: {"chat_template": text}),
    "tokenizer": ("tokenizer_config.json", lambda text: {"chat_template": text}),
    "list": ("tokenizer_config.json", lambda text: {"chat_template": named(tool_use="tools", default=text)}),
    "object": ("tokenizer_config.json", lambda text: {"chat_template": {"default": text, "rag": "documents"}}),
    "folder": ("additional_chat_templates/default.jinja", lambda text: text),
}


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


@pytest.fixture
def bare(copy_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """A checkpoint without any template."""

    def strip(family: str) -> Path:
        folder = copy_checkpoint(family, lambda content: content.pop("chat_template", None), "tokenizer_config.json")
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        return folder

    return strip


def put(folder: Path, place: str, text: str) -> None:
    name, make = PLACES[place]
    path, content = folder / name, make(text)
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content})
    path.write_text(str(content), encoding="utf-8")


def template(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    return recognise(checkpoint.config).plan(checkpoint).chat_template


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["minicpmv2_5", "minicpmv2_6", "minicpmv4_0", "minicpmv4_5", "minicpmv4_6", "minicpm_ocr"])
def test_every_place(family: str, place: str, bare: Callable[[str], Path]) -> None:
    folder = bare(family)
    with pytest.raises(CheckpointError, match=r"no chat template: neither chat_template\.jinja"):
        template(folder)
    put(folder, place, "{{ it }}")
    assert template(folder) == "{{ it }}"


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("minicpmv2_6", ["jinja", "tokenizer", "processor", "json"]),  # chat() asks the tokenizer
        ("minicpmv4_6", ["processor", "json", "jinja", "tokenizer"]),  # transformers 5.24 asks the processor
    ],
)
def test_order(family: str, order: list[str], bare: Callable[[str], Path]) -> None:
    folder = bare(family)
    for place in reversed(order):
        put(folder, place, place)
        assert template(folder) == place


@pytest.mark.parametrize("family", ["minicpmv4_6", "minicpmv4_7", "minicpm_ocr"])
def test_order_is_that_of_transformers(family: str, bare: Callable[[str], Path]) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.18")
    folder = bare(family)
    for place in ("tokenizer", "jinja", "json", "processor"):
        put(folder, place, place)
        settings, _ = transformers.ProcessorMixin.get_processor_dict(str(folder))
        asked = settings.get("chat_template") or transformers.AutoTokenizer.from_pretrained(str(folder)).chat_template
        assert template(folder) == asked == place


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (named(tool_use="tools", rag="documents"), "templates named rag, tool_use, but none named default"),
        ([{"template": "x"}], "neither a template nor several"),
        (7, "neither a template nor several"),
        ({"default": 3}, "neither a template nor several"),
    ],
)
def test_refused(value: Any, line: str, bare: Callable[[str], Path], copy_checkpoint: Callable[..., Path]) -> None:
    bare("minicpmv2_6")
    folder = copy_checkpoint("minicpmv2_6", lambda content: content.update(chat_template=value), "tokenizer_config.json")
    with pytest.raises(CheckpointError, match=line):
        template(folder)


def test_the_special_tokens_that_a_template_names(bare: Callable[[str], Path], copy_checkpoint: Callable[..., Path]) -> None:
    folder = bare("minicpmv2_6")
    put(folder, "jinja", "{{ bos_token }}{{ pad_token }}{{ my_eos_token }}")
    copy_checkpoint("minicpmv2_6", lambda c: c.pop("pad_token"), "tokenizer_config.json")
    copy_checkpoint("minicpmv2_6", lambda c: c.update(pad_token={"content": "<unk>"}), "special_tokens_map.json")
    checkpoint = open_checkpoint(folder)
    text = recognise(checkpoint.config).plan(checkpoint).text
    assert text.template_variables == {"bos_token": "<|im_start|>", "pad_token": "<unk>"}
