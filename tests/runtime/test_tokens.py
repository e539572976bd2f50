"""The streaming detokenizer: pieces join to the full decoding, and no character is broken."""

import json
import random

import pytest

from mcv_runtime.errors import BundleCorruptError, PromptError
from mcv_runtime.text.tokens import AnswerText, Detokenizer, TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(golden_root):
    return TextTokenizer((golden_root / "minicpmv2_6" / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"))


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def test_random_ids(tokenizer):
    """Mostly invalid UTF-8."""
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(584) for _ in range(rng.randint(0, 60))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_characters_are_never_broken(tokenizer):
    text = "Grüße, 世界! 👩‍👩‍👧 नमस्ते é \u200d x"
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 10


def test_bytes_as_tokens():
    """A SentencePiece-style tokenizer: a run of byte tokens is text only if all of it is."""
    vocab = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    tokenizer = TextTokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder}))
    assert "".join(stream(tokenizer, tokenizer.encode("a世a界"))) == "a世a界"
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.choice((1, rng.randrange(258))) for _ in range(rng.randint(0, 20))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_unfinished_character_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("a世")[:-1]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


def test_answer_text_is_stripped_and_hides_ids(tokenizer):
    rng = random.Random(2)
    hidden = frozenset({0, 562})
    for _ in range(300):
        ids = tokenizer.encode(" \n " * rng.randint(0, 2)) + rng.choices(
            [*tokenizer.encode(" a\n b. 世"), 0, 562], k=rng.randint(0, 20)
        )
        text = AnswerText(tokenizer, hidden)
        pieces = [*map(text.push, ids), text.finish()]
        assert "".join(pieces) == text.text == tokenizer.decode([token for token in ids if token not in hidden]).strip()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"added_tokens": 5}'])
def test_unusable_tokenizer(content):
    with pytest.raises(BundleCorruptError, match="tokenizer"):
        TextTokenizer(content)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
GROWING = {
    "normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 12},
    "a regular expression": {"type": "Replace", "pattern": {"Regex": "."}, "content": "b" * 1000},
    "an empty pattern": {"type": "Replace", "pattern": {"String": ""}, "content": "b" * 1000},
    "many steps": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100},
    "before a text": {"type": "Prepend", "prepend": "x" * 100_000},
}


def small_tokenizer(**changes):
    vocab = {"<unk>": 0, "a": 1, "b": 2}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model, **changes})


@pytest.mark.parametrize("token", ["b" * 1_000_000, "\x1b[31m"])
def test_a_stranger_s_name_for_a_token_is_not_repeated_whole(token):
    with pytest.raises(BundleCorruptError, match="does not have") as caught:
        TextTokenizer(small_tokenizer()).id_of(token)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", GROWING)
def test_a_tokenizer_that_blows_texts_up_is_refused(name):
    with pytest.raises(BundleCorruptError, match="normalizer would make a text many times as long"):
        TextTokenizer(small_tokenizer(normalizer=GROWING[name]))
    decoder = {"type": "Sequence", "decoders": [REPLACE] * 12}
    with pytest.raises(BundleCorruptError, match="decoder would make"):
        TextTokenizer(small_tokenizer(decoder=decoder))
    usual = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "b"}, REPLACE | {"content": "b"}]}
    assert TextTokenizer(small_tokenizer(normalizer=usual)).encode("aa") == [2, 2, 2]


def test_ids_beyond_any_vocabulary_are_refused():
    """llguidance makes a table with a place for each."""
    with pytest.raises(BundleCorruptError, match="it has the id 4294967295"):
        TextTokenizer(small_tokenizer(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}))
    token = {"id": 2**31, "content": "<x>", "special": True}
    with pytest.raises(BundleCorruptError, match="it has the id 2147483648"):
        TextTokenizer(small_tokenizer(added_tokens=[token]))


class PanicException(BaseException):
    """As pyo3 makes it: no exception that anything handles."""


class Panicking:
    def encode(self, *arguments, **named):
        raise PanicException("called `Result::unwrap()` on an `Err` value:\n StackOverflow")

    decode = encode


def test_a_panic_is_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_tokenizer", Panicking())
    with pytest.raises(
        PromptError, match=r"cannot read the prompt: it ended in a panic: called .* value: StackOverflow"
    ) as said:
        tokenizer.encode("a")
    assert "\n" not in str(said.value)
    with pytest.raises(BundleCorruptError, match="panic"):
        tokenizer.decode([1])


def test_an_honest_tokenizer_that_panics(golden_root):
    """onig gives up on eleven million spaces; its caller panics."""
    tokenizer = TextTokenizer((golden_root / "minicpmv2_6" / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"))
    with pytest.raises(PromptError, match="panic"):
        tokenizer.encode(" " * 11_000_000 + "x")
