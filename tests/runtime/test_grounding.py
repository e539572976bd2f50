"""Asking where something is: marks that a prompt may have, and places that an answer names."""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from mcv_runtime import Region, load, locate
from mcv_runtime.bundle.manifest import PlaceholderSpec, TextSpec
from mcv_runtime.errors import OptionError, PromptError
from mcv_runtime.pictures.slicing import SliceGrid
from mcv_runtime.request.answer import Answer, Timings
from mcv_runtime.text.grounding import MARKS, find_regions, mark_ids
from mcv_runtime.text.prompts import Message, PromptBuilder
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer

ONE = SliceGrid(overview=(448, 448))
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def builder(tokenizer_json):
    tokenizer = TextTokenizer(tokenizer_json)
    text = TextSpec(vocab_size=100_000, context_length=32768)
    return PromptBuilder(tokenizer, ChatTemplate(PLAIN), text, PlaceholderSpec(token="<unk>", tokens_per_slice=2))


@pytest.fixture(
    scope="module", params=["minicpmv2_0", "minicpmv2_5", "minicpmv2_6", "minicpmv4_0", "minicpmv4_5", "minicpmv4_6"]
)
def tokenizer_json(golden_root, request):
    return (golden_root / request.param / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8")


def marks_in(ids, prompts):
    return [token for token in ids.tolist() if token in mark_ids(prompts.tokenizer)]


@pytest.mark.parametrize(
    "typed",
    [
        locate("the red book"),
        "<ref>书</ref>",
        "What is at <box>10 20 300 400</box>?\n<point>5 6</point> <quad>1 1 2 1 2 2 1 2</quad>",
        "</ref><ref><ref>",
    ],
)
def test_marks_are_the_published_tokens_on_demand(tokenizer_json, typed):
    """The ids that the published code has: it encodes the text as it is, marks and all."""
    prompts = builder(tokenizer_json)
    asked = [Message("user", (ONE, typed))]
    prompt = prompts.build(asked, grounding=True)
    assert prompt.ids.tolist() == Tokenizer.from_str(tokenizer_json).encode(prompt.text).ids
    assert len(marks_in(prompt.ids, prompts)) == sum(typed.count(mark) for mark in MARKS)
    assert marks_in(prompts.build(asked).ids, prompts) == []
    assert prompts.build(asked).text == prompt.text
    plain = [Message("user", (ONE, "No marks."))]
    assert prompts.build(plain, grounding=True).ids.tolist() == prompts.build(plain).ids.tolist()


CLOSE = ["<<ref>image>", "<im<box>age>", "<ref><unk></ref>", "</im<ref>age>", "<image></ref>", "<|im_end|><ref>"]


@pytest.mark.parametrize("typed", CLOSE)
def test_no_other_token_comes_with_them(tokenizer_json, typed):
    prompts = builder(tokenizer_json)
    control = {token["id"] for token in json.loads(tokenizer_json)["added_tokens"] if token["special"]}
    seen = prompts.build([Message("user", (ONE, typed))], grounding=True)
    usual = prompts.build([Message("user", (ONE, "x"))])
    others = control - mark_ids(prompts.tokenizer)
    assert sum(token in others for token in seen.ids.tolist()) == sum(token in others for token in usual.ids.tolist())
    assert typed in seen.text


def test_a_model_without_marks_refuses():
    tokenizer = json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"},
    })  # fmt: skip
    with pytest.raises(OptionError, match="no marks for places in a picture; leave grounding out"):
        builder(tokenizer).build([Message("user", ("a",))], grounding=True)


def test_the_question():
    asked = "Please provide the bounding box coordinate of the region this sentence describes: <ref>a book</ref>"
    assert locate("a book") == asked  # OpenBMB/MiniCPM-V#982
    for wrong in (" ", "a</ref><box>"):
        with pytest.raises(PromptError):
            locate(wrong)


@pytest.mark.parametrize(
    ("said", "regions"),
    [
        ("<box>100 200 500 1000</box>", [Region("box", ((64, 96), (320, 480)))]),
        (
            "<ref>a cat</ref><box>0 0 500 500</box> and <ref> 狗 </ref><box>1 1 2 2</box><box>3 3 1000 1000</box>",
            [
                Region("box", ((0, 0), (320, 240)), "a cat"),
                Region("box", ((0, 0), (1, 0)), "狗"),
                Region("box", ((1, 1), (640, 480)), "狗"),
            ],
        ),
        ("at <point>250 750</point>.", [Region("point", ((160, 360),))]),
        ("<quad>0 0 1000 0 1000 1000 0 1000</quad>", [Region("quad", ((0, 0), (640, 0), (640, 480), (0, 480)))]),
        ("<box>[[100, 200, 500, 1000],[0, 0, 50, 50]]</box>", [
            Region("box", ((64, 96), (320, 480))), Region("box", ((0, 0), (32, 24))),
        ]),
        ("<box>-5 2000 12.5 1000</box>", [Region("box", ((0, 480), (8, 480)))]),
        ('[{"name": "x", "box": "<box>100 200 500 1000</box>"}]', [Region("box", ((64, 96), (320, 480)))]),
        ("<box>1 2 3</box><box>a b c d</box><box></box><box>1 2 3 4", []),
        ("<think>maybe <box>1 1 9 9</box></think><point>0 0</point>", [Region("point", ((0, 0),))]),
        ("Nothing is there.", []),
    ],
)  # fmt: skip
def test_places_in_an_answer(said, regions):
    """Thousandths of width and height, as the cookbook of 4.6 reads them: `int(x / 1000 * width)`."""
    assert list(find_regions(said, (640, 480))) == regions


def test_which_picture():
    class Seen:
        def __init__(self, size):
            self.size, self.page = size, None

    def answer(*sizes):
        return Answer(
            text="<point>500 500</point>", tokens=(), stop_reason="stop", prompt_tokens=(), timings=Timings(),
            pictures=tuple(map(Seen, sizes)),
        )  # fmt: skip

    assert answer((100, 60)).regions()[0].points == ((50, 30),)
    assert answer((100, 60), (20, 10)).regions(picture=1)[0].points == ((10, 5),)
    for pictures, which in (((100, 60), (20, 10)), None), (((9, 9),), 1), (((9, 9),), -1), ((), None):
        with pytest.raises(OptionError, match=f"about {len(pictures)} pictures; say which one"):
            answer(*pictures).regions(which)


def test_through_the_public_door(tmp_path):
    engine = load()
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(photo)
    marks = mark_ids(engine._answerer._tokenizer)
    asked = engine.ask(photo, locate("the circle"), grounding=True, max_new_tokens=2)
    assert sum(token in marks for token in asked.prompt_tokens) == 2
    assert isinstance(asked.regions(), tuple)
    assert not marks & set(engine.ask(photo, locate("the circle"), max_new_tokens=2).prompt_tokens)


def test_marks_are_not_removed_from_such_an_answer(engine_of):
    """The merger generation removes all special tokens from answers, where its marks are among these."""
    answerer = engine_of("minicpmv4_6")._answerer
    marks = mark_ids(answerer._tokenizer)
    assert marks

    def dropped(**options):
        from mcv_runtime.request.options import Options, Settings

        return answerer._dropped(Settings.of(Options(**options), answerer._manifest.generation))

    assert marks <= dropped()
    assert dropped(grounding=True) == dropped() - marks
