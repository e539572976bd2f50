"""Train the tiny model's tokenizer: Qwen2's byte-level BPE with a vocabulary of the templates' lower-case words.

python models/tiny/tokenizer.py CHECKPOINT_FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from questions import QUESTIONS, ZH_COLOURS, ZH_SHAPES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 640
"""Bytes and merges, before the special tokens."""

ADDITIONAL = [
    "<image>", "</image>", "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<point>", "</point>",
    "<slice>", "</slice>", "<image_id>", "</image_id>", "<unk>", *(f"<|reserved_special_token_{k}|>" for k in range(6)),
]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ADDITIONAL]
"""In the order of the published vocabulary."""

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2's pre-tokenizer: words with one leading blank, single digits, punctuation."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus() -> Iterator[str]:
    """Every wording and answer word; printed text is absent, so that its capitals and digits stay single tokens."""
    for _ in range(20):
        yield "system\nYou are a helpful assistant.\nuser\n\nassistant\n"
    for english, chinese in QUESTIONS.values():
        for wording in english:
            for text in (wording.format("shape"), wording[0].upper() + wording[1:].format("shape")):
                yield from [text] * 3
        for wording in chinese:
            yield from [wording.format("\n")] * 3
    for colour, colour_zh in ZH_COLOURS.items():
        for shape, shape_zh in ZH_SHAPES.items():
            yield f"{'an' if colour == 'orange' else 'a'} {colour} {shape} and a {colour} {shape} and the text "
            yield f"{colour}\n{shape}\n{colour_zh}\n{shape_zh}\n"
            yield f"一个\n{colour_zh}\n的\n{shape_zh}\n和\n文字 \n"  # on lines of their own: no merges across words
    for _ in range(10):
        yield "yes\nno\nthe first\nthe second\n相同\n不同\n第一张\n第二张\n"


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def write(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json as the published model has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    if tokenizer.token_to_id("!") != 0:
        raise ValueError("'!' must have id 0, which the family drops from answers")
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    config = {
        "add_prefix_space": False,
        "additional_special_tokens": ADDITIONAL,
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 1000000000000000019884624838656,
        "split_special_tokens": False,
        "tokenizer_class": "MiniCPMVTokenizer",
        **named,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **plain, "special": True} for token in SPECIAL
        },
    }
    write_json(folder / "tokenizer_config.json", config)
    token_map = {name: {"content": token, **plain} for name, token in named.items()}
    write_json(folder / "special_tokens_map.json", {**token_map, "additional_special_tokens": ADDITIONAL})


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
