"""What an `adapter_config.json` says: every key is understood or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mcv_export.checkpoint import ADAPTER_CONFIG, read_json
from mcv_runtime.errors import CheckpointError

_BOOKKEEPING = frozenset(
    {
        *("auto_mapping", "base_model_class", "parent_library", "peft_version", "revision", "task_type"),
        *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    }
)
"""Keys that say how an adapter was begun, trained or run: what is merged is the same, whatever they are."""
_UNMERGEABLE = {
    "alora_invocation_tokens": "it acts from certain words of a prompt on",
    "arrow_config": "it chooses among adapters for each token",
    "kasa_config": "it leaves out a part of the base's weights",
    "layer_replication": "it is of a base with repeated layers",
    "megatron_config": "it is of layers that Megatron split",
    "monteclora_config": "it is a distribution of weights",
    "target_parameters": "it changes parameters that belong to no layer",
    "use_bdlora": "its matrices are blocks on a diagonal",
    "use_qalora": "it is of a base that was quantized with GPTQ",
    "velora_config": "it keeps more than its two matrices",
}
_BEGINNINGS = (True, False, None, "eva", "gaussian", "mica", "orthogonal", "true", "false")
_RESIDUAL = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga")
"""Beginnings that take out of the base what they put into the adapter (or round the base): it is of another base since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """How a LoRA's tensors are meant. A layer's name is the one that it had in training."""

    where: Path
    base: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    rank_stabilized: bool
    magnitudes: bool
    """DoRA: the length of each row is learned by itself."""
    biased: bool
    """Whether a LoRA has a bias that is added to its layer's."""
    target: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    """Modules that the adapter holds in full."""
    tokens: Mapping[str, tuple[int, ...]]
    """Rows of embeddings that it holds in full, by the embedding's name."""
    keeps_ties: bool
    """Whether an embedding that is also the head stays so when it is saved in full."""

    def rank_of(self, layer: str) -> int:
        return _whole(self._by_pattern(self.rank_pattern, layer, self.rank), "rank_pattern", self.where)

    def scaling(self, layer: str) -> float:
        """The factor of B times A."""
        alpha = _number(self._by_pattern(self.alpha_pattern, layer, self.alpha), "alpha_pattern", self.where)
        rank = self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def targets(self, layer: str) -> bool:
        """Whether the layer has a LoRA."""
        if _named(self.exclude, layer) or self.saves(layer):
            return False
        if self.target is None or self.target == "all-linear":
            return True
        if not _named(self.target, layer):
            return False
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for match in (re.match(pattern, layer) for pattern in patterns) if match), None)
        return found is not None and int(found[1]) in self.layers

    def saves(self, name: str) -> bool:
        """Whether a module, or what is inside it, is held in full."""
        return any(f".{module}." in f".{name}." for module in self.saved)

    @staticmethod
    def _by_pattern(patterns: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), otherwise)


def read_settings(folder: Path) -> LoraSettings:
    """Of an adapter's folder; raises `CheckpointError`."""
    where = folder / ADAPTER_CONFIG
    if not where.is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")) if folder.is_dir() else []
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise CheckpointError(f"{folder} has no {ADAPTER_CONFIG}, so it is no adapter{hint}")
    data = dict(read_json(where))
    take = data.pop
    kind = take("peft_type", None)
    if kind != "LORA":
        _refuse(where, "peft_type", kind, "LORA is merged, other kinds are not")
    beginning = take("init_lora_weights", True)
    if isinstance(beginning, str) and _RESIDUAL.fullmatch(beginning.lower()):
        _refuse(
            where,
            "init_lora_weights",
            beginning,
            "it is of what such a beginning leaves of the base; have PEFT convert it (save_pretrained with "
            "path_initial_model_for_weight_conversion), or build from that rest and write true there",
        )
    if beginning not in _BEGINNINGS:
        _refuse(where, "init_lora_weights", beginning, "which is unknown")
    if (bias := take("bias", "none")) not in ("none", "all", "lora_only"):
        _refuse(where, "bias", bias, "which is none of none, all, lora_only")
    _flag(
        take("fan_in_fan_out", False), "fan_in_fan_out", where
    )  # no layer here is [in, out], and PEFT then takes it for false
    layers = take("layers_to_transform", None)
    settings = LoraSettings(
        where=where,
        base=_text(take("base_model_name_or_path", None), "base_model_name_or_path", where),
        rank=_whole(take("r", 8), "r", where),
        alpha=_number(take("lora_alpha", 8), "lora_alpha", where),
        rank_pattern=_patterns(take("rank_pattern", None), "rank_pattern", where),
        alpha_pattern=_patterns(take("alpha_pattern", None), "alpha_pattern", where),
        rank_stabilized=_flag(take("use_rslora", False), "use_rslora", where),
        magnitudes=_flag(take("use_dora", False), "use_dora", where),
        biased=_flag(take("lora_bias", False), "lora_bias", where),
        target=_names(take("target_modules", None), "target_modules", where, absent=None),
        exclude=_names(take("exclude_modules", None), "exclude_modules", where, absent=()) or (),
        layers=_numbers(layers, "layers_to_transform", where) if layers not in (None, []) else None,
        layers_pattern=_strings(take("layers_pattern", None), "layers_pattern", where),
        saved=_strings(take("modules_to_save", None), "modules_to_save", where),
        tokens=_tokens(take("trainable_token_indices", None), where),
        keeps_ties=_flag(take("ensure_weight_tying", False), "ensure_weight_tying", where),
    )
    for key, value in data.items():
        if key in _BOOKKEEPING or not value:  # what is not set, or switched off, changes nothing
            continue
        _refuse(where, key, value, f"{_UNMERGEABLE[key]}: it cannot be merged" if key in _UNMERGEABLE else "a key unknown here")
    if isinstance(settings.target, str) and settings.layers is not None:
        _refuse(where, "layers_to_transform", layers, "which PEFT has for lists of target_modules only")
    _try_patterns(settings)
    return settings


def _try_patterns(settings: LoraSettings) -> None:
    """Raise for a pattern that is no regular expression before it is needed."""
    try:
        settings.targets("a")
        for name in settings.layers_pattern:
            re.compile(name)
        for patterns in (settings.rank_pattern, settings.alpha_pattern):
            for pattern in patterns:
                re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise CheckpointError(f"{settings.where} has a pattern that is no regular expression ({error})") from None


def _named(wanted: str | Collection[str], layer: str) -> bool:
    """By a regular expression for the whole name, or by a list of names or their ends."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in wanted)


def _refuse(where: Path, key: str, value: object, why: str) -> NoReturn:
    said = repr(value)
    said = said if len(said) <= 60 else f"{said[:60]}..."
    raise CheckpointError(f"{where} has {key}={said}: {why}")


def _whole(value: Any, key: str, where: Path) -> int:
    if type(value) is not int or value < 1:
        _refuse(where, key, value, "a positive integer is wanted")
    return value


def _number(value: Any, key: str, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(where, key, value, "a number is wanted")
    return float(value)


def _flag(value: Any, key: str, where: Path) -> bool:
    if value not in (True, False, None):
        _refuse(where, key, value, "true or false is wanted")
    return bool(value)


def _text(value: Any, key: str, where: Path) -> str | None:
    if value is not None and not isinstance(value, str):
        _refuse(where, key, value, "a string is wanted")
    return value or None


def _patterns(value: Any, key: str, where: Path) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        _refuse(where, key, value, "an object is wanted")
    return value or {}


def _strings(value: Any, key: str, where: Path) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) and value else value or []
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        _refuse(where, key, value, "a list of strings is wanted")
    return tuple(values)


def _names(value: Any, key: str, where: Path, *, absent: tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if value is None:
        return absent
    return value if isinstance(value, str) else _strings(value, key, where)


def _numbers(value: Any, key: str, where: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in values):
        _refuse(where, key, value, "numbers from 0 on are wanted")
    return tuple(values)


def _tokens(value: Any, where: Path) -> Mapping[str, tuple[int, ...]]:
    by_name = {"": value} if isinstance(value, list) else _patterns(value, "trainable_token_indices", where)
    return {name: _numbers(ids, "trainable_token_indices", where) for name, ids in by_name.items()}
