"""The sizes of a checkpoint, as its `config.json` says them: enough for a peer to make a model of the same shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A vision tower, what compresses its patches, and a decoder."""

    decoder: str  # llama, qwen2 or qwen3_5
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    tied: bool
    text: dict[str, Any]
    """The decoder's part of the config: sizes of linear attention are in it."""
    queries: int  # of a resampler; 0 where patches are merged
    merge_after: int
    """The layer behind which windows of patches are merged, where they are."""
    tower: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: str | Path) -> Shape:
        config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        hybrid = text.get("model_type") == "qwen3_5_text"
        return cls(
            decoder="qwen3_5" if hybrid else {2.6: "qwen2"}.get(float(config.get("version", 0)), "llama"),
            hidden=text["hidden_size"],
            ffn=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocab=text["vocab_size"],
            rope_theta=float((text.get("rope_parameters") or text).get("rope_theta", 10000.0)),
            tied=bool(config.get("tie_word_embeddings", False)),
            text=text,
            queries=config.get("query_num", 0),
            merge_after=config.get("insert_layer_id", 0),
            tower=config["vision_config"],
        )

    @property
    def rotated(self) -> int:
        """Channels of a head that turn with the position."""
        return int(self.head_dim * (self.text.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0))
