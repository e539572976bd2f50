"""The streaming detokenizer: pieces join to the full decoding, and no character is broken."""

import json
import random

import pytest

from mcv_runtime.errors import BundleCorruptError
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
