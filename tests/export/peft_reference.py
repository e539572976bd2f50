"""PEFT's own merge of adapters into a checkpoint's tensors, in float32: what ours is held against."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer


class Skeleton(nn.Module):
    """The modules of a checkpoint under their names, without a way to run them: PEFT needs no more."""

    _tied_weights_keys: dict[str, str] | None = None

    def __init__(self, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config or {"model_type": "custom"}
        owners: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            owner, _, leaf = name.rpartition(".")
            owners.setdefault(owner, {})[leaf] = value.float()
        for owner in sorted(owners, key=lambda name: name.count(".")):
            self._place(owner, owners[owner])

    def get_input_embeddings(self) -> nn.Module:
        return next(module for name, module in self.named_modules() if name.endswith("embed_tokens"))

    def get_output_embeddings(self) -> nn.Module:
        return next(module for name, module in self.named_modules() if name.endswith("lm_head"))

    def _place(self, owner: str, leaves: dict[str, torch.Tensor]) -> None:
        *path, last = owner.split(".")
        parent: nn.Module = self
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        made = _module(owner, leaves)
        for leaf, value in leaves.items():
            if made is None:
                made = nn.Module()
            made.register_parameter(leaf, nn.Parameter(value.clone()))
        if made is not None and not hasattr(parent, last):
            parent.add_module(last, made)
        elif made is not None:
            for leaf, value in leaves.items():
                getattr(parent, last).register_parameter(leaf, nn.Parameter(value.clone()))


def _module(owner: str, leaves: dict[str, torch.Tensor]) -> nn.Module | None:
    if "in_proj_weight" in leaves:
        return nn.MultiheadAttention(leaves["in_proj_weight"].shape[1], 1)
    weight = leaves.get("weight")
    if weight is None:
        return None
    bias = "bias" in leaves
    if weight.dim() == 4:
        return nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=bias)
    if weight.dim() == 2 and "embed" in owner:
        return nn.Embedding(*weight.shape)
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias) if weight.dim() == 2 else None


def skeleton(checkpoint: Path) -> Skeleton:
    """Of a golden checkpoint; one whose head is its embedding has both."""
    tensors = load_file(checkpoint / "model.safetensors")
    if any("lm_head" in name for name in tensors):
        return Skeleton(tensors)
    embedding = "model.language_model.embed_tokens.weight"
    model = Skeleton(tensors | {"lm_head.weight": tensors[embedding]}, {"model_type": "custom", "tie_word_embeddings": True})
    model._tied_weights_keys = {"lm_head.weight": embedding}
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def train(model: nn.Module, out: Path, *, seed: int = 0, base: str | None = None, **settings: Any) -> Path:
    """Save an adapter of random values that are far from none."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if value.requires_grad:
                    factor = 0.02 if "lora_magnitude" in name else 0.1
                    value += factor * torch.randn(value.shape, generator=generator)
        if base is not None:
            wrapped.peft_config["default"].base_model_name_or_path = base
        wrapped.save_pretrained(out)
    return out


def merged(model: nn.Module, adapters: Sequence[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """The tensors after `merge_and_unload` of all of them, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"number{index}" for index in range(len(adapters))]
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), adapters[0][0], adapter_name=names[0])
        for name, (folder, _) in list(zip(names, adapters, strict=True))[1:]:
            wrapped.load_adapter(folder, adapter_name=name)
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                for name, (_, weight) in zip(names, adapters, strict=True):
                    layer.set_scale(name, weight)
        wrapped.base_model.set_adapter(names)
        return dict(wrapped.merge_and_unload(adapter_names=names if len(names) > 1 else None).state_dict())


def combined(model: nn.Module, folders: Sequence[Path], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The tensors with the one adapter that `add_weighted_adapter` makes of several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"number{index}" for index in range(len(folders))]
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name=names[0])
        for name, folder in list(zip(names, folders, strict=True))[1:]:
            wrapped.load_adapter(folder, adapter_name=name)
        wrapped.add_weighted_adapter(names, list(weights), "all", combination_type="cat")
        wrapped.set_adapter("all")
        return dict(wrapped.merge_and_unload().state_dict())
