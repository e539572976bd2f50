"""An embedding that is the head too: what a change of one does to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mcv_export.adapters.tensors import same_values
from mcv_export.checkpoint import Checkpoint
from mcv_export.config import Config

_KEY = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Tie:
    """The names of the one tensor; a checkpoint may hold it a second time, as the head."""

    embedding: str
    head: str

    @property
    def modules(self) -> tuple[str, str]:
        return self.embedding.removesuffix(".weight"), self.head.removesuffix(".weight")

    def without_copy(self, checkpoint: Checkpoint) -> Checkpoint:
        """So that the head is read where the embedding is."""
        return replace(checkpoint, tensors={name: held for name, held in checkpoint.tensors.items() if name != self.head})


def tie_of(checkpoint: Checkpoint) -> Tie | None:
    """None where embedding and head are two."""
    if not _says_tied(checkpoint.config):
        return None
    for embedding, head in (
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("llm.model.embed_tokens.weight", "llm.lm_head.weight"),
        ("model.embed_tokens.weight", "lm_head.weight"),
    ):
        if embedding in checkpoint.tensors:
            return Tie(embedding, head) if _is_one(checkpoint, embedding, head) else None
    return None


def untied(checkpoint: Checkpoint, tie: Tie) -> Checkpoint:
    """The checkpoint with the head by itself."""
    tensors = dict(checkpoint.tensors)
    tensors[tie.head] = tensors[tie.embedding]
    config: dict[str, Any] = {**checkpoint.config, _KEY: False}
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = {**config["text_config"], _KEY: False}
    return replace(checkpoint, tensors=tensors, config=Config(config))


def _says_tied(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    return bool(config.get(_KEY) or (isinstance(text, Mapping) and text.get(_KEY)))


def _is_one(checkpoint: Checkpoint, embedding: str, head: str) -> bool:
    """Whether the head is not there, or is the embedding again."""
    other = checkpoint.tensors.get(head)
    return other is None or same_values(checkpoint.tensors[embedding], other)
