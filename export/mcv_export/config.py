"""Reading values from a checkpoint's JSON files, with errors that name the key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mcv_export.checkpoint import Checkpoint
from mcv_runtime.bundle.manifest import GenerationSpec
from mcv_runtime.errors import CheckpointError
from mcv_runtime.files import parse_json


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object."""
    value = config.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json has no section {key!r}")
    return value


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(_complaint(key, value, "a positive integer"))
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(_complaint(key, value, "a positive number"))
    return float(value)


def numbers(config: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A list of numbers."""
    value = config.get(key, default)
    if not isinstance(value, list | tuple) or not all(isinstance(item, int | float) for item in value):
        raise CheckpointError(_complaint(key, value, "a list of numbers"))
    return tuple(map(float, value))


def affine(names: Mapping[str, str]) -> dict[str, str]:
    """`.weight` and `.bias` of each module, ours -> the checkpoint's."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}


def generation(
    checkpoint: Checkpoint, *, stop_tokens: Sequence[str], repetition_penalty: float, max_new_tokens: int
) -> GenerationSpec:
    """Stop tokens by name; the penalty from generation_config.json where it has one, else the family's own."""
    ids = token_ids(checkpoint)
    if missing := [token for token in stop_tokens if token not in ids]:
        raise CheckpointError(f"tokenizer.json lacks the stop token {missing[0]}")
    defaults = checkpoint.json("generation_config.json")
    return GenerationSpec(
        stop_token_ids=tuple(ids[token] for token in stop_tokens),
        repetition_penalty=number(defaults, "repetition_penalty", repetition_penalty),
        max_new_tokens=max_new_tokens,
    )


def expect(config: Mapping[str, Any], key: str, wanted: object) -> None:
    """Raise `CheckpointError` where a key has another than the one value that is supported."""
    value = config.get(key, wanted)
    if (list(value) if isinstance(value, tuple) else value) != wanted:
        raise CheckpointError(f"config has {key}={value!r}; of this family mcv knows {wanted!r} only")


def chat_template(checkpoint: Checkpoint) -> str:
    """The checkpoint's chat template, from its own file or from tokenizer_config.json."""
    if os.path.lexists(checkpoint.folder / "chat_template.jinja"):
        return checkpoint.text("chat_template.jinja")
    template = checkpoint.json("tokenizer_config.json").get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{checkpoint.folder} has no chat template, neither chat_template.jinja nor in tokenizer_config.json"
        )
    return template


def copy_texts(checkpoint: Checkpoint, folder: Path, template: str | None) -> None:
    """Tokenizer and configs as the checkpoint has them, and the chat template."""
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        if os.path.lexists(checkpoint.folder / name):
            (folder / name).write_bytes(checkpoint.text(name).encode())
    # newline="": a template is data, its line ends stay as they are
    with (folder / "chat_template.jinja").open("w", encoding="utf-8", newline="") as file:
        file.write(template or chat_template(checkpoint))


def template_variables(checkpoint: Checkpoint) -> dict[str, str]:
    """The special tokens that a chat template may name, from tokenizer_config.json."""
    settings = checkpoint.json("tokenizer_config.json")
    tokens = {name: settings.get(name) for name in ("bos_token", "eos_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def token_ids(checkpoint: Checkpoint) -> dict[str, int]:
    """The added tokens of tokenizer.json by text."""
    return {content: number for content, number, _ in _added_tokens(checkpoint)}


def special_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The added tokens of tokenizer.json that are no text."""
    return tuple(number for _, number, special in _added_tokens(checkpoint) if special)


def newline_id(checkpoint: Checkpoint, config: Mapping[str, Any]) -> int:
    """The token of a single line break, from config.json or else the tokenizer itself."""
    if isinstance(known := config.get("newline_id"), int):
        return known
    try:
        ids = Tokenizer.from_str(checkpoint.text("tokenizer.json")).encode("\n", add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"tokenizer.json cannot be used: {error}") from None
    if len(ids) != 1:
        raise CheckpointError("tokenizer.json has no token for a line break")
    return int(ids[0])


def _added_tokens(checkpoint: Checkpoint) -> list[tuple[str, int, bool]]:
    path = checkpoint.folder / "tokenizer.json"
    if not os.path.lexists(path):
        raise CheckpointError(f"{checkpoint.folder} has no tokenizer.json")
    settings = parse_json(checkpoint.text("tokenizer.json"), str(path), error=CheckpointError)
    try:
        tokens = settings["added_tokens"]
        return [(token["content"], token["id"], bool(token.get("special"))) for token in tokens]
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from None


def _complaint(key: str, value: object, wanted: str) -> str:
    return f"config lacks the key {key!r}" if value is None else f"config has {key}={value!r}, which is not {wanted}"
