"""What a checkpoint says about text: its tokenizer's tokens, where answers end, its chat template."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from mcv_export import config as cfg
from mcv_export.checkpoint import Checkpoint
from mcv_runtime.bundle.manifest import GenerationSpec
from mcv_runtime.errors import CheckpointError, shown
from mcv_runtime.files import parse_json

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def generation(
    checkpoint: Checkpoint,
    *,
    vocab_size: int,
    stop_tokens: Sequence[str],
    fixed: bool,
    repetition_penalty: float,
    max_new_tokens: int,
) -> GenerationSpec:
    """Where answers end and how they are chosen: generation_config.json, and where it says nothing the family.

    `fixed`: the published code ends answers at `stop_tokens` whatever generation_config.json says, whose ids are then more of
    them. A stop id may be any token, an ordinary one too. Raises `CheckpointError`.
    """
    ids = token_ids(checkpoint)
    defaults = checkpoint.json("generation_config.json")
    given = _token_list(defaults, "eos_token_id", vocab_size)
    own: list[int] = []
    if fixed or not given:
        if missing := [token for token in stop_tokens if token not in ids]:
            raise CheckpointError(f"tokenizer.json lacks the stop token {missing[0]}")
        own = [ids[token] for token in stop_tokens]
        config = cfg.Overlay(checkpoint.config, cfg.optional_section(checkpoint.config, "text_config"))
        given = given or _token_list(config, "eos_token_id", vocab_size)
    cfg.expect(cfg.optional_section(defaults, "chat_template_kwargs"), "enable_thinking", False)
    return GenerationSpec(
        stop_token_ids=tuple(dict.fromkeys([*own, *given])),
        repetition_penalty=cfg.number(defaults, "repetition_penalty", repetition_penalty),
        max_new_tokens=cfg.integer(defaults, "max_new_tokens", max_new_tokens),
    )


def _token_list(config: Mapping[str, Any], key: str, vocab_size: int) -> list[int]:
    """An id or a list of ids; empty if there is none."""
    value = config.get(key, [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and 0 <= item < vocab_size for item in ids):
        raise CheckpointError(f"config has {key}={shown(value)}, which are not ids of its {vocab_size} tokens")
    return list(ids)


def chat_template(checkpoint: Checkpoint, *, asked: Literal["tokenizer", "processor"]) -> str:
    """The checkpoint's chat template, from where transformers takes it; raises `CheckpointError`.

    The published code of a family asks its tokenizer for it, or its processor; each looks in its own files first.
    """
    files = _template_files(checkpoint)
    tokenizer = (files, _named_templates(checkpoint.json("tokenizer_config.json").get("chat_template")))
    processor = (
        _named_templates(checkpoint.json("processor_config.json").get("chat_template")),
        _named_templates(checkpoint.json("chat_template.json").get("chat_template")),
        files,
    )
    places = (*tokenizer, *processor) if asked == "tokenizer" else (*processor, *tokenizer)
    found = next((templates for templates in places if templates), None)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.folder} has no chat template: neither chat_template.jinja nor chat_template.json, nor one in "
            "tokenizer_config.json or processor_config.json"
        )
    if "default" not in found:
        raise CheckpointError(
            f"{checkpoint.folder} has chat templates named {', '.join(sorted(found))}, but none named default; "
            "save the one to use as chat_template.jinja"
        )
    return found["default"]


def _template_files(checkpoint: Checkpoint) -> dict[str, str]:
    """chat_template.jinja as `default`, and what is in additional_chat_templates by name."""
    paths = {path.stem: path for path in sorted((checkpoint.folder / "additional_chat_templates").glob("*.jinja"))}
    if os.path.lexists(plain := checkpoint.folder / "chat_template.jinja"):
        paths["default"] = plain
    return {name: checkpoint.text(path.relative_to(checkpoint.folder).as_posix()) for name, path in paths.items()}


def _named_templates(value: object) -> dict[str, str]:
    """Templates by name: a string is the default one; several come as an object, or as a list of objects with a name each."""
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = dict(value) if isinstance(value, Mapping) else {one["name"]: one["template"] for one in value}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError(f"chat_template={shown(value)} is neither a template nor several with their names")
    return named


def template_variables(checkpoint: Checkpoint, template: str) -> dict[str, str]:
    """The special tokens that a chat template names, from tokenizer_config.json or else special_tokens_map.json."""
    settings = cfg.Overlay(checkpoint.json("tokenizer_config.json"), checkpoint.json("special_tokens_map.json"))
    texts = {name: _content(settings.get(name)) for name in _SPECIAL_TOKENS if re.search(rf"\b{name}\b", template)}
    return {name: text for name, text in texts.items() if text is not None}


def named_token(checkpoint: Checkpoint, name: str, default: str) -> str:
    """A token that tokenizer_config.json gives a name of the model's own, such as `image_start_token`."""
    settings = checkpoint.json("tokenizer_config.json")
    extra = settings.get("extra_special_tokens")
    found = _content(extra.get(name)) if isinstance(extra, Mapping) else None
    return found or _content(settings.get(name)) or default


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def copy_texts(checkpoint: Checkpoint, folder: Path, template: str) -> None:
    """Tokenizer and configs as the checkpoint has them, and the chat template."""
    for name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json", "generation_config.json"):
        if os.path.lexists(checkpoint.folder / name):
            (folder / name).write_bytes(checkpoint.text(name).encode())
    # newline="": a template is data, its line ends stay as they are
    with (folder / "chat_template.jinja").open("w", encoding="utf-8", newline="") as file:
        file.write(template)


def token_ids(checkpoint: Checkpoint) -> dict[str, int]:
    """The added tokens of tokenizer.json by text."""
    return {content: number for content, number, _ in _added_tokens(checkpoint)}


def special_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The added tokens of tokenizer.json that are no text."""
    return tuple(number for _, number, special in _added_tokens(checkpoint) if special)


def newline_id(checkpoint: Checkpoint, config: Mapping[str, Any]) -> int:
    """The token of a single line break, from config.json or else the tokenizer itself."""
    if "newline_id" in config:
        return cfg.integer(config, "newline_id", least=0)
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
