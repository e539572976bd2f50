"""The files of an adapter's folder, and what each of their tensors is: half of a LoRA, rows of an embedding, a tensor in full.

Names as PEFT writes them, old and new, in `adapter_model.safetensors` or `adapter_model.bin`, and as fine-tuning scripts write
what they trained in full into a file beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mcv_export.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CheckpointTensor
from mcv_export.tensor_files import read_tensors
from mcv_runtime.errors import CheckpointError

BESIDE = ("vpm_resampler_embedtokens.pt", "vit.safetensors", "non_lora_trainables.bin")
"""Of the published fine-tuning script, of ms-swift's full vision training, and of LLaVA's script, which OmniLMM's is like."""
EXTENDED = ("new_embeddings.safetensors", "new_embeddings.bin")
"""Rows of tokens that the base has not."""

_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_LORA = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<layer>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_SAVED = re.compile(r"(?P<layer>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_COPIES = re.compile(r".+\.(original_module\..+|token_adapter\.trainable_tokens_original(\..+)?)")
"""What PEFT keeps of the base beside what it replaces."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A LoRA's tensors by the part that they are; `name` is the layer's in training, `wrapped` that of what PEFT wrapped."""

    name: str
    wrapped: str
    parts: Mapping[str, CheckpointTensor]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter's folder holds, under the names that the base had in training."""

    paths: tuple[Path, ...]
    layers: tuple[Layer, ...]
    tokens: Mapping[str, CheckpointTensor]
    """Rows of embeddings, by the embedding's name."""
    full: Mapping[str, CheckpointTensor]


def read_files(folder: Path) -> AdapterFiles:
    """Read the places of all tensors; raises `CheckpointError`."""
    for name in EXTENDED:
        if (folder / name).exists():
            raise CheckpointError(f"{folder / name} holds tokens that the base has not; resize the base's embeddings first")
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has no weights: neither {' nor '.join(ADAPTER_WEIGHTS)}")
    paths = [weights, *(folder / name for name in BESIDE if (folder / name).exists())]
    layers: dict[str, dict[str, CheckpointTensor]] = {}
    wrapped: dict[str, str] = {}
    tokens: dict[str, CheckpointTensor] = {}
    full: dict[str, CheckpointTensor] = {}
    names = set()
    for path in paths:
        for key, tensor in read_tensors(path).items():
            name = _as_in_training(key)
            if found := _LORA.fullmatch(name):
                layer = found["layer"].replace(".base_layer.", ".")
                part = f"{found['part']}.bias" if found["leaf"] == "bias" else found["part"]
                layers.setdefault(layer, {})[part] = tensor
                wrapped[layer] = found["layer"].partition(".base_layer.")[0]
            elif found := _TOKENS.fullmatch(name):
                tokens[found["layer"]] = tensor
            elif found := _SAVED.fullmatch(name):
                full[f"{found['layer']}.{found['rest']}"] = tensor
            elif not _COPIES.fullmatch(name):
                full[re.sub(r"\.(token_adapter|base_layer)(?=\.)", "", name)] = tensor
            if found:
                names.add(found["adapter"])
    if len(names - {None}) > 1:
        raise CheckpointError(f"{weights} holds several adapters, {' and '.join(map(repr, sorted(names - {None})))}; save one")
    if not layers and not tokens and not full:
        raise CheckpointError(f"{weights} holds no tensor")
    return AdapterFiles(
        (folder / ADAPTER_CONFIG, *paths),
        tuple(Layer(name, wrapped[name], parts) for name, parts in layers.items()),
        tokens,
        full,
    )


def _as_in_training(key: str) -> str:
    """The name without what PEFT and the distributed trainers wrap around a model."""
    return _WRAPPERS.sub("", key).removeprefix("module.").replace("base_model.model.", "", 1)
