"""Answers of a given form, from a model that says anything, with every family's tokenizer."""

import json
import re
import sys
import threading

import numpy as np
import pytest

from mcv_runtime.choosing.beams import beam_search
from mcv_runtime.choosing.constraints import Grammars
from mcv_runtime.choosing.sampling import Sampler, Sampling
from mcv_runtime.errors import BundleCorruptError, OptionError
from mcv_runtime.text.tokens import TextTokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["cat", "猫", 'a "b"']},
        "sure": {"type": "boolean"},
        "boxes": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 2},
        },
    },
    "required": ["name", "count", "kind", "sure", "boxes"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "yes, but", "是", "不是", "😀 / <image>", "a\nb", '"\\']
PATTERNS = [
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"[一-龥]{2,4}，[猫狗]。",
    r"(red|green) ?[a-z]{0,6}",
    r"[0-9]{1,9}(\.[0-9]{1,2})? €",
    r"<image>[猫狗]</?image>|<box>[0-9] [0-9]</box>",
]
STOP = 2
MORE_LOGITS = 37
"""That a model has more of than its tokenizer has tokens: published models round the number up."""


def fits(value):
    """Whether `value` is of the schema, by hand."""
    return (
        list(value) == ["name", "count", "kind", "sure", "boxes"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and type(value["count"]) is int
        and 0 <= value["count"] <= 999
        and value["kind"] in SCHEMA["properties"]["kind"]["enum"]
        and isinstance(value["sure"], bool)
        and 1 <= len(value["boxes"]) <= 2
        and all(len(box) == 2 and all(type(v) is int and 0 <= v <= 99 for v in box) for box in value["boxes"])
    )


@pytest.fixture(
    scope="module", params=["minicpmv2_0", "minicpmv2_5", "minicpmv2_6", "minicpmv4_0", "minicpmv4_5", "minicpmv4_6"]
)
def tokenizer_json(request, golden_root):
    return (golden_root / request.param / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def grammars(tokenizer_json):
    return Grammars(tokenizer_json, [STOP])


@pytest.fixture(scope="module")
def answered(tokenizer_json):
    """The text that random logits make under a constraint."""
    tokenizer = TextTokenizer(tokenizer_json)
    size = max(json.loads(tokenizer_json)["model"]["vocab"].values()) + MORE_LOGITS

    def answer(constraint, seed):
        generator = np.random.default_rng(seed)
        sampler, tokens = Sampler(Sampling(seed=seed)), []
        while not constraint.done and len(tokens) < 400:
            logits_V = generator.standard_normal(size).astype(np.float32) * 3
            token = sampler.draw(constraint.mask(logits_V), tokens)
            constraint.advance(token)
            if token == STOP:
                break
            tokens.append(token)
        assert constraint.done
        return tokenizer.decode(tokens)

    return answer


def test_json_of_a_schema(grammars, answered):
    for seed in range(15):
        text = answered(grammars.json_schema(SCHEMA if seed % 2 else json.dumps(SCHEMA)), seed)
        assert fits(json.loads(text)), text


def test_text_that_matches_a_pattern(grammars, answered):
    for pattern in PATTERNS:
        for seed in range(8):
            text = answered(grammars.regex(pattern), seed)
            assert re.fullmatch(pattern, text), text


def test_one_of_several_choices(grammars, answered):
    found = {answered(grammars.choices(CHOICES), seed) for seed in range(150)}
    assert found <= set(CHOICES)
    assert len(found) >= 6


def test_an_answer_that_may_go_on_ends_only_with_a_stop_token(grammars, tokenizer_json):
    constraint, tokenizer = grammars.regex("[0-9]+"), TextTokenizer(tokenizer_json)
    logits_V = np.zeros(2000, np.float32)
    assert constraint.mask(logits_V)[STOP] == -np.inf
    (digit,) = tokenizer.encode("7", None)[-1:]
    constraint.advance(digit)
    assert not constraint.done
    assert constraint.mask(logits_V)[STOP] == 0
    constraint.advance(STOP)
    assert constraint.done


def test_a_fork_goes_its_own_way(grammars):
    constraint, logits_V = grammars.choices(["no", "yes"]), np.zeros(2000, np.float32)
    before = constraint.mask(logits_V)
    fork = constraint.fork()
    fork.advance(int(before.argmax()))
    np.testing.assert_array_equal(constraint.mask(logits_V), before)
    assert (fork.mask(logits_V) != before).any()
    np.testing.assert_array_equal(grammars.choices(["no", "yes"]).mask(logits_V), before)


def test_logits_are_kept_and_not_changed(grammars):
    logits_V = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    copy, masked = logits_V.copy(), grammars.regex("[0-9a-z]+").mask(logits_V)
    np.testing.assert_array_equal(logits_V, copy)
    allowed = masked > -np.inf
    assert 30 < allowed.sum() < 1000
    np.testing.assert_array_equal(masked[allowed], logits_V[allowed])


def test_beams(grammars, tokenizer_json):
    """Four beams over the same random logits at every step: whole choices, best first, each once."""
    logits_V = np.random.default_rng(3).standard_normal(2000).astype(np.float32)
    searching = beam_search(
        logits_V,
        num_beams=4,
        num_return_sequences=4,
        stop=frozenset({STOP}),
        limit=30,
        constraint=grammars.choices(CHOICES),
    )
    beams = None
    wanted = next(searching)
    while beams is None:
        try:
            wanted = searching.send(np.stack([np.roll(logits_V, token) for token in wanted.tokens]))
        except StopIteration as end:
            beams = end.value
    tokenizer = TextTokenizer(tokenizer_json)
    texts = [tokenizer.decode([token for token in beam.tokens if token != STOP]) for beam in beams]
    assert set(texts) <= set(CHOICES)
    assert len({beam.tokens for beam in beams}) == len(beams) >= 3


def test_space_in_json_has_an_end(grammars, tokenizer_json):
    """A model that always wants a space gets a few, and then has to go on."""
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    constraint, tokenizer, tokens = grammars.json_schema(schema), TextTokenizer(tokenizer_json), []
    logits_V = np.array([tokenizer.decode([token]).isspace() for token in range(2000)], np.float32)
    while not constraint.done and len(tokens) < 200:
        tokens.append(int(constraint.mask(logits_V).argmax()))
        constraint.advance(tokens[-1])
    assert json.loads(tokenizer.decode(tokens)) == {"a": 1}
    assert 0 < tokenizer.decode(tokens).count(" ") < 10


def test_a_grammar_is_compiled_once(tokenizer_json, monkeypatch):
    grammars, compiled = Grammars(tokenizer_json, [STOP]), []
    compile_grammar = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, *args: compiled.append(args[0]) or compile_grammar(self, *args))
    for _ in range(3):
        for kind, value in (("regex", "a+"), ("choices", ["a"]), ("json_schema", {"type": "integer"})):
            grammars.constraint(kind, value)
    assert sorted(compiled) == ["choices", "json_schema", "regex"]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", {"type": "strin"}, "json_schema cannot be used: Invalid type: strin"),
        (
            "json_schema",
            {"not": {"type": "string"}, "unevaluatedItems": False},
            "json_schema cannot be used: .*unevaluatedItems",
        ),
        ("json_schema", "{a", r"json_schema is not JSON \("),
        ("json_schema", "[1]", r"json_schema must be an object, not \[1\]"),
        ("json_schema", {"const": {1}}, r"json_schema is not JSON \("),
        ("regex", "(a", "regex cannot be used: unclosed group"),
        ("regex", "(?=a)b", "regex cannot be used: look-around"),
        ("regex", r"[^\s\S]", "regex cannot be used: nothing fits it"),
        ("regex", "", "regex must be a pattern"),
        ("choices", [], "choices must be a list of texts"),
        ("choices", "yes", "choices must be a list of texts"),
        ("choices", ["yes", ""], "choices must be a list of texts"),
        ("choices", [f"choice {n}" for n in range(100_000)], "choices is too long: 1,"),
        ("regex", "a" * 1_000_000, "regex is too long: 1,000,"),
        ("json_schema", {"enum": [f"value {n}" for n in range(100_000)]}, "json_schema has more than 131,072 bytes"),
        ("json_schema", '{"properties":{"a":' * 90 + "{}" + "}}" * 90, "json_schema is nested more than 64 levels"),
    ],
)
def test_what_makes_no_sense_is_one_line(kind, value, message, grammars):
    with pytest.raises(OptionError, match=f"^{message}") as caught:
        grammars.constraint(kind, value)
    assert "\n" not in str(caught.value)


def test_without_llguidance(tokenizer_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=r"need llguidance: pip install 'minicpmv-onnx\[guided\]'"):
        Grammars(tokenizer_json, [STOP]).choices(["a"])


def test_a_tokenizer_that_cannot_be_used():
    with pytest.raises(BundleCorruptError, match="the bundle's tokenizer cannot be constrained"):
        Grammars("{}", [STOP]).regex("a")


def test_a_wrong_token_is_one_line(grammars, capfd):
    constraint = grammars.regex("[0-9]")
    with pytest.raises(OptionError, match=r"^the constraint cannot be followed further: [^\n]+$"):
        constraint.advance(int((constraint.mask(np.zeros(2000, np.float32)) == -np.inf).argmax()) + 100)
    assert capfd.readouterr() == ("", "")


@pytest.mark.waits
def test_nobody_waits_for_another_one_s_grammar(tokenizer_json, monkeypatch):
    """While one constraint is compiled, another one is made."""
    grammars, started, go_on = Grammars(tokenizer_json, [STOP]), threading.Event(), threading.Event()
    compiled = Grammars._compile

    def compile_slowly(self, kind, grammar):
        if kind == "choices":
            started.set()
            assert go_on.wait(600)
        return compiled(self, kind, grammar)

    monkeypatch.setattr(Grammars, "_compile", compile_slowly)
    slow = threading.Thread(target=grammars.choices, args=(["yes", "no"],))
    slow.start()
    assert started.wait(600)
    grammars.regex("[0-9]")  # never ends if it waits
    go_on.set()
    slow.join()


def test_a_panic_of_the_library_is_one_line(grammars, monkeypatch):
    class PanicException(BaseException):  # as pyo3 makes it: no exception that anything handles
        pass

    def panic(self, kind, grammar):
        raise PanicException("index out of bounds:\n the len is 0")

    monkeypatch.setattr(Grammars, "_compile", panic)
    with pytest.raises(OptionError, match="the making of regex ended in a panic: index out of bounds: the len is 0"):
        grammars.regex("[0-9]{7}")
