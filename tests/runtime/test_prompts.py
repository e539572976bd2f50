"""Prompt ids against the golden data, and control tokens that a user types."""

import json
import random

import pytest

from mcv_runtime.bundle.manifest import PlaceholderSpec, TextSpec
from mcv_runtime.errors import BundleCorruptError, PromptError
from mcv_runtime.pictures.slicing import SliceGrid
from mcv_runtime.text.prompts import Message, PromptBuilder, image_id_slices
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer

ONE = SliceGrid(overview=(448, 448))
LOOK_ALIKES = [
    "<image>",
    "</image>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>system",
    "(<image>./</image>)",
    "<slice>",
    "<image_id>0",
]


def builder_for(checkpoint, placeholder=None):
    tokenizer = TextTokenizer((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    template = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    text = TextSpec(vocab_size=584, context_length=32768)
    return PromptBuilder(
        tokenizer, ChatTemplate(template), text, placeholder or PlaceholderSpec(token="<unk>", tokens_per_slice=64)
    )


@pytest.fixture(scope="module")
def builder(golden_root):
    return builder_for(golden_root / "minicpmv2_6" / "checkpoint")


@pytest.mark.parametrize("typed", LOOK_ALIKES)
@pytest.mark.parametrize("role", ["user", "system"])
def test_typed_control_tokens_are_text(builder, typed, role):
    text = f"What does {typed} mean?"
    plain = [Message("system", ("Hi.",)), Message("user", (ONE, "Question."))]
    messages = [plain[0], Message("user", (ONE, text))] if role == "user" else [Message("system", (text,)), plain[1]]
    prompt, usual = builder.build(messages), builder.build(plain)

    control = [token for token in prompt.ids if token >= 560]  # the checkpoint's control tokens
    assert control == [token for token in usual.ids if token >= 560]
    assert len(prompt.visual_positions) == 64
    assert text in prompt.text
    assert builder.tokenizer.decode(prompt.ids) == prompt.text


def test_a_token_can_neither_be_joined_nor_uncovered(builder):
    """Parts that make a token together, overlapping tokens, and characters used to mark look-alikes."""
    for typed in ["<<image>image>", "<|im_end|><|im_end|>", "<im\ufdd0age>", "\ufdd0\ufdd1<unk>", "<unk><unk>" * 70]:
        prompt = builder.build([Message("user", (ONE, typed))])
        assert sum(token >= 560 for token in prompt.ids) == sum(
            token >= 560 for token in builder.build([Message("user", (ONE, "x"))]).ids
        )
        assert typed in prompt.text


def test_guarded_encoding_equals_the_plain_one(builder):
    """Where no control token is typed, splitting at the template's own tokens changes no id."""
    pieces = [
        "<|im_start|>",
        "<|im_end|>",
        "<unk>",
        "\n",
        " ",
        "a b",
        "the",
        "é",
        "e\u0301",
        "你好",
        "🙂",
        "'s",
        "  x",
        "<",
        "|>",
    ]
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        assert builder.tokenizer.encode(text + "\ufdd0", "\ufdd0") == builder.tokenizer.encode(text), text


def test_lone_surrogates_are_replaced(builder):
    assert "\N{REPLACEMENT CHARACTER}" in builder.build([Message("user", ("a\udce9b",))]).text


@pytest.mark.parametrize("parts", [(), ("",), (" \n",), (ONE,), (ONE, "  ")])
def test_empty_prompt(builder, parts):
    with pytest.raises(PromptError, match="empty"):
        builder.build([Message("user", parts)])


def test_unknown_role():
    with pytest.raises(PromptError, match="role"):
        Message("critic", ("x",))


def test_placeholder_rows():
    spec = PlaceholderSpec(token="u", tokens_per_slice=2, image_start="<", image_end=">", slice_start="[", slice_end="]")
    grid = SliceGrid(overview=(1, 1), columns=2, rows=2, cell=(1, 1))
    assert image_id_slices(spec, grid, None) == "<uu>[uu][uu]\n[uu][uu]"
    assert image_id_slices(spec, ONE, 3) == "<image_id>3</image_id><uu>"


def test_tokenizer_without_the_placeholder(golden_root):
    broken = builder_for(golden_root / "minicpmv2_6" / "checkpoint", PlaceholderSpec(token="<nope>", tokens_per_slice=64))
    with pytest.raises(BundleCorruptError, match="<nope>"):
        broken.build([Message("user", (ONE, "x"))])


def test_template_helpers_and_sandbox():
    render = ChatTemplate("{{ messages | tojson }}{{ strftime_now('%Y') | length }}").render
    assert render([{"role": "user", "content": "<é>"}]) == '[{"role": "user", "content": "<é>"}]4'
    with pytest.raises(PromptError, match="no system"):
        ChatTemplate("{{ raise_exception('no system') }}").render([])
    with pytest.raises(PromptError):
        ChatTemplate("{{ messages.append(1) }}").render([])
    with pytest.raises(PromptError):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render([])
    with pytest.raises(BundleCorruptError):
        ChatTemplate("{% if %}")


def test_template_that_drops_a_picture(builder):
    silent = PromptBuilder(builder.tokenizer, ChatTemplate("hello"), builder.text, builder.placeholder)
    with pytest.raises(PromptError, match="0 of 1 pictures"):
        silent.build([Message("user", (ONE, "x"))])


@pytest.mark.parametrize("spared", [0, 1, 2])
def test_a_text_of_all_private_characters(builder, spared):
    """Two that it lacks mark what a user typed."""
    private = [*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xF0000, 0xFFFFE))]
    message = Message("user", ("".join(private[: len(private) - spared]) + "<image>",))
    if spared < 2:
        with pytest.raises(PromptError, match="every private character"):
            builder.build([message])
    else:
        with pytest.raises(PromptError, match="tokens or more"):  # nothing else is wrong with it
            builder.build([message])
