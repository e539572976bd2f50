"""Reading a published checkpoint: its folder, its config, and where its tensors are."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mcv_export.config import Config
from mcv_export.tensor_files import LoadedTensor, StoredTensor, read_tensors, require_float
from mcv_runtime.bundle.manifest import AdapterSpec
from mcv_runtime.errors import CheckpointError, printable
from mcv_runtime.files import parse_json, read_regular, read_text

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
_LORA = re.compile(r"(?:^|\.)(?:lora_[A-Za-z_]+|base_layer|modules_to_save)\.")
_JSON_BYTES = 16 << 20
_log = logging.getLogger(__name__)


class CheckpointTensor(Protocol):
    """A tensor that is read a few rows at a time."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) as float32, the tensor taken as a matrix: [last - first, columns], the caller's own to change."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder in the Hugging Face layout."""

    folder: Path
    config: Config
    tensors: Mapping[str, CheckpointTensor]
    adapters: tuple[AdapterSpec, ...] = ()
    """What is merged into the tensors."""
    opened: dict[str, Config] = field(default_factory=dict, repr=False)
    """The JSON files that were asked for, but for config.json."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):  # a changed copy of it
            object.__setattr__(self, "config", Config(self.config))

    def json(self, name: str) -> Config:
        """A JSON file of the checkpoint, empty if it is not there; the same object each time."""
        if name not in self.opened:
            path = self.folder / name
            self.opened[name] = Config(read_json(path) if os.path.lexists(path) else {}, name)
        return self.opened[name]

    def text(self, name: str) -> str:
        """A text file of the checkpoint."""
        path = self.folder / name
        return read_text(path, error=CheckpointError, within=_lawful_folder(path))

    def tensor(self, name: str) -> CheckpointTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}; is a file of it missing?") from None


def open_checkpoint(folder: Path, *, adapter_known: bool = False) -> Checkpoint:
    """Read `config.json` and every tensor's place, but no tensor; raises `CheckpointError`.

    `adapter_known`: the folder may hold an adapter beside the model, because the caller merges it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is neither a folder nor a hub id such as openbmb/MiniCPM-V-2_6")
    _refuse_adapter(folder, adapter_known)
    if not os.path.lexists(folder / "config.json"):
        raise CheckpointError(
            f"{folder} has no config.json; a checkpoint folder holds config.json, tokenizer.json and *.safetensors"
        )
    config = read_json(folder / "config.json")
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if quantized := place.get(key) if isinstance(place, dict) else None:
                method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
                raise CheckpointError(f"{folder} is already quantized ({method}); build from the full-precision checkpoint")
    tensors = _find_tensors(folder)
    _refuse_unmerged(folder, tensors)
    _require_layers(config, len(tensors))
    return Checkpoint(folder, Config(config), tensors)


def _refuse_adapter(folder: Path, adapter_known: bool) -> None:
    """An adapter's folder is no model, and one beside a model may be meant with it or without."""
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        return
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = printable(base) if isinstance(base, str) and base else "BASE"
    if not any(os.path.lexists(folder / name) for name in _WEIGHT_FILES):
        raise CheckpointError(
            f"{folder} is an adapter of {base}, not a model; merge it: mcv-export build {base} OUT --adapter {folder}"
        )
    if not adapter_known and any(os.path.lexists(folder / name) for name in ADAPTER_WEIGHTS):
        raise CheckpointError(
            f"{folder} holds a model and an adapter of {base}; merge it with --adapter {folder}, "
            "or move the adapter's files elsewhere"
        )


def _refuse_unmerged(folder: Path, tensors: Iterable[str]) -> None:
    """A model that was saved with its adapter still beside each weight."""
    if found := next((name for name in tensors if _LORA.search(name)), None):
        raise CheckpointError(
            f"{folder} holds a model with an adapter that is not merged ({printable(found)}); "
            "save it again after peft's merge_and_unload()"
        )


def _require_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a number of layers that would take hours to lay out: each has a tensor."""
    for place in (config, *config.values()):
        count = place.get("num_hidden_layers") if isinstance(place, dict) else None
        if isinstance(count, int) and count > tensors:
            raise CheckpointError(f"config.json has num_hidden_layers={count}, but the checkpoint has only {tensors} tensors")


def _find_tensors(folder: Path) -> Mapping[str, StoredTensor | LoadedTensor]:
    present = [name for name in _WEIGHT_FILES if os.path.lexists(folder / name)]
    for name in present:
        if not name.endswith(".index.json"):
            if f"{name}.index.json" in present:
                _log.warning("%s is read, as transformers does, and not what %s.index.json names", folder / name, name)
            return read_tensors(folder / name)
        weight_map = _weight_map(folder / name)
        shards = sorted(set(weight_map.values()))
        if name != present[-1] and not any(os.path.lexists(folder / shard) for shard in shards):
            continue  # left over from weights that are gone
        return _read_shards(folder, shards, weight_map)
    raise CheckpointError(f"{folder} has no weights: neither {', '.join(_WEIGHT_FILES[:-1])} nor {_WEIGHT_FILES[-1]}")


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for shard in weight_map.values():
        # The index comes from a stranger: a shard is a file of this folder, nothing else.
        if (
            not isinstance(shard, str)
            or shard in ("", ".", "..")
            or Path(shard).name != shard
            or not shard.isprintable()
            or len(shard) > 255
        ):
            raise CheckpointError(f"{index.parent} lacks the shard {printable(str(shard))[:255]}; download it again")
    return weight_map


def _read_shards(folder: Path, shards: list[str], weight_map: Mapping[str, str]) -> dict[str, StoredTensor | LoadedTensor]:
    tensors: dict[str, StoredTensor | LoadedTensor] = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise CheckpointError(f"{folder} lacks the shard {shard}; download it again")
        found = read_tensors(folder / shard)
        # of a tensor that two shards hold, the index says which counts
        tensors |= {name: tensor for name, tensor in found.items() if name not in tensors or weight_map.get(name) == shard}
    return tensors


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache, `models--OWNER--NAME/snapshots/COMMIT`; None for any other folder."""
    folder = folder.absolute()
    in_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return folder.name if in_cache and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def require_floats(tensor: CheckpointTensor) -> None:
    """Raise `CheckpointError` for a tensor whose numbers are no plain floats; one that is merged looks at its own."""
    if isinstance(tensor, StoredTensor | LoadedTensor):
        require_float(tensor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a checkpoint's file holds; raises `CheckpointError`."""
    text = read_regular(path, error=CheckpointError, within=_lawful_folder(path), max_bytes=_JSON_BYTES)
    data = parse_json(text, str(path), error=CheckpointError, max_bytes=_JSON_BYTES)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data


def _lawful_folder(path: Path) -> Path:
    """Where a file may lie: in its own folder, or elsewhere under the same name, as `ln -s BASE/* .` has it.

    What a stranger's link leads to under another name, the user's secrets for example, is nobody's to read into a bundle.
    """
    real = Path(os.path.realpath(path))
    return real.parent if real.name == path.name else path.parent
