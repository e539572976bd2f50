"""Tokenizer, chat template and slicing of the merger generation against the reference."""

import json

import pytest

from mcv_runtime.bundle.manifest import ImageSpec, PlaceholderSpec, TextSpec
from mcv_runtime.pictures.slicing import ClipGrid, SliceGrid, adaptive_grid
from mcv_runtime.text.prompts import Message, PromptBuilder
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer

ONE = SliceGrid(overview=(56, 56), token_unit=56)


@pytest.fixture(scope="module")
def golden(golden_root):
    return json.loads((golden_root / "minicpmv4_6" / "text_golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def builder(golden_root):
    checkpoint = golden_root / "minicpmv4_6" / "checkpoint"
    return PromptBuilder(
        TextTokenizer((checkpoint / "tokenizer.json").read_text(encoding="utf-8")),
        ChatTemplate((checkpoint / "chat_template.jinja").read_text(encoding="utf-8")),
        TextSpec(vocab_size=1550, context_length=4096),
        PlaceholderSpec(token="<|image_pad|>", video_token="<|video_pad|>", use_image_id=False),
    )


def test_tokens_of_many_scripts(golden, builder):
    for case in golden["tokenization"]:
        assert builder.tokenizer.encode(case["text"]) == case["ids"]
        assert builder.tokenizer.decode(case["ids"]) == case["decoded"]


def parts(content):
    one = {"image": ONE, "video": ClipGrid((ONE,))}
    return (content,) if isinstance(content, str) else tuple(one.get(part["type"], part.get("text")) for part in content)


def test_templates(golden, builder):
    checked = 0
    for case in golden["templates"]:
        plain = all(message.keys() == {"role", "content"} and message["role"] != "tool" for message in case["messages"])
        if not plain or case["kwargs"].keys() - {"enable_thinking", "add_generation_prompt"}:
            continue  # tools and thoughts given apart are not in our interface
        if not case["kwargs"]["add_generation_prompt"]:
            continue
        messages = [Message(message["role"], parts(message["content"])) for message in case["messages"]]
        prompt = builder.build(messages, thinking=case["kwargs"].get("enable_thinking", False))
        bare = prompt.text.replace("<image>", "").replace("</image>", "")
        assert bare == case["rendered"], case["id"]
        checked += 1
    assert checked >= 9


def test_typed_control_tokens_are_text(builder):
    for typed in ("<|image_pad|>", "<|video_pad|>", "<image>", "</think>", "<|im_end|>", "<slice>"):
        prompt = builder.build([Message("user", (ONE, f"What does {typed} mean?"))])
        assert len(prompt.visual_positions) == 1
        assert builder.tokenizer.decode(prompt.ids) == prompt.text
        usual = builder.build([Message("user", (ONE, "What does it mean?"))])
        assert sum(token >= 1500 for token in prompt.ids) == sum(token >= 1500 for token in usual.ids)


def test_every_golden_grid(golden_root, merger_family):
    cases = json.loads((golden_root / merger_family / "slicing.json").read_text())
    assert len(cases) >= 100
    for case in cases:
        image = ImageSpec(slicing="aligned_grid", scale_resolution=case["scale_resolution"], patch_size=case["patch_size"])
        unit = case["patch_size"] * (4 if case["downsample_mode"] == "16x" else 2)
        grid = adaptive_grid((case["width"], case["height"]), image, case["max_slice_nums"], unit)
        assert ([grid.rows, grid.columns] if grid.columns else None) == case["grid_rows_cols"], case
        assert list(grid.overview[::-1]) == case["source_hw"], case
        rows, columns = grid.token_shapes[0]
        assert rows * columns == case["source_tokens"]
        if grid.columns:
            assert list(grid.refined[::-1]) == case["refine_hw"], case
            assert list(grid.cell[::-1]) == case["slice_hw"], case
