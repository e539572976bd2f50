"""A decoder of a shape as a folder that transformers, and what builds on it, can read. Random weights, in bf16."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from shapes import Shape


def config_of(shape: Shape) -> Any:
    """The configuration of a causal language model."""
    common = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": shape.tied,
    }
    if shape.decoder == "qwen3_5":
        from transformers import Qwen3_5TextConfig

        return Qwen3_5TextConfig(**(dict(shape.text) | common))
    if shape.decoder == "qwen2":
        from transformers import Qwen2Config

        del common["head_dim"]
        return Qwen2Config(**common)
    from transformers import LlamaConfig

    return LlamaConfig(**common)


def random_model(shape: Shape) -> Any:
    """The model itself; memory that nobody has filled yet is filled with a drawn block over and over."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() < 2:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            scaled, flat = (drawn * value.shape[-1] ** -0.5).to(value.dtype), value.view(-1)
            for start in range(0, flat.numel(), len(scaled)):
                flat[start : start + len(scaled)] = scaled[: flat.numel() - start]
        for module in model.modules():  # tables that are computed, not loaded
            if hasattr(module, "inv_freq"):
                module.inv_freq.copy_(1 / shape.rope_theta ** torch.linspace(0, 1, len(module.inv_freq) + 1)[:-1])
    return model


def save(shape: Shape, checkpoint: Path, folder: Path) -> Path:
    """Write it once, with the checkpoint's tokenizer."""
    if not (folder / "config.json").exists():
        part = folder.with_name(f"{folder.name}.part")
        random_model(shape).save_pretrained(part)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, part / name)
        part.rename(folder)
    return folder
