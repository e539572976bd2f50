"""A checkpoint with adapters: the same files, and tensors that are merged while they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np

from mcv_export.adapters.adapter import Adapter
from mcv_export.adapters.files import AdapterFiles, Layer, read_files
from mcv_export.adapters.names import is_of_another_maker, is_of_another_model, renaming
from mcv_export.adapters.settings import LoraSettings, read_settings
from mcv_export.adapters.tensors import Bias, Delta, InFull, LowRank, MergedTensor, TokenRows, same_values
from mcv_export.adapters.ties import Tie, tie_of, untied
from mcv_export.checkpoint import ADAPTER_CONFIG, Checkpoint, CheckpointTensor, require_floats
from mcv_export.families import recognise
from mcv_export.tensor_files import matrix_shape
from mcv_runtime.errors import CheckpointError, shown

_BUFFERS = ("inv_freq", "pos_embed", "position_ids")
"""What modules saved in full may have stored beside their parameters, and every checkpoint leaves out that can compute it."""


def merge(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """The checkpoint with the adapters merged in their order; raises `CheckpointError` for one that is not of this base."""
    if not adapters:
        return checkpoint
    family = recognise(checkpoint.config)
    read = [(adapter, read_settings(adapter.folder), read_files(adapter.folder)) for adapter in adapters]
    merger = _Merger(checkpoint, family.title, family.plan(checkpoint).ignored, tie_of(checkpoint))
    merger.separate_head = any(merger.separates(settings) for _, settings, _ in read)
    for one in read:
        merger.add(*one)
    return replace(merger.merged(), adapters=tuple(adapter.spec(files.paths) for adapter, _, files in read))


@dataclass(slots=True)
class _Merger:
    """What adapters do to each of the base's tensors."""

    checkpoint: Checkpoint
    title: str
    ignored: tuple[str, ...]
    tie: Tie | None
    full: dict[str, tuple[InFull, Adapter]] = field(default_factory=dict)
    deltas: dict[str, list[Delta]] = field(default_factory=dict)
    rows: dict[str, list[TokenRows]] = field(default_factory=dict)
    separate_head: bool = False
    """Whether embedding and head become two."""

    def separates(self, settings: LoraSettings) -> bool:
        """Whether an adapter holds one of embedding and head in full by itself: PEFT then trains a copy of that one alone."""
        return self.tie is not None and not settings.keeps_ties and any(map(settings.saves, self.tie.modules))

    def add(self, adapter: Adapter, settings: LoraSettings, files: AdapterFiles) -> None:
        """Take in one adapter, its files checked against the base."""
        name_of = self._names(adapter, settings, files)
        for key, tensor in files.full.items():
            name = name_of.get(key)
            if name is not None:
                self._put_in_full(adapter, name, key, tensor)
        for layer in files.layers:
            self._put_layer(adapter, settings, layer, name_of)
        for embedding, tensor in files.tokens.items():
            self._put_rows(adapter, settings, embedding, tensor, name_of[f"{embedding}.weight"])
        self._require_saved(adapter, settings, set(name_of.values()))

    def merged(self) -> Checkpoint:
        """The checkpoint as it then is."""
        checkpoint, tie = self.checkpoint, self.tie
        changed = self.full.keys() | self.deltas.keys() | self.rows.keys()
        if tie and self.separate_head:
            checkpoint = untied(checkpoint, tie)
        elif tie and tie.embedding in changed:
            checkpoint = tie.without_copy(checkpoint)
        tensors = dict(checkpoint.tensors)
        for name in changed:
            in_full = self.full.get(name)
            deltas = [*self.deltas.get(name, ()), *self.rows.get(name, ())]
            tensors[name] = MergedTensor(tensors[name], in_full and in_full[0], deltas)
        return replace(checkpoint, tensors=tensors)

    def _base(self, name: str) -> CheckpointTensor | None:
        """The base's tensor; a head that is the embedding's is that one."""
        tie = self.tie
        return self.checkpoint.tensors.get(tie.embedding if tie and name == tie.head else name)

    def _names(self, adapter: Adapter, settings: LoraSettings, files: AdapterFiles) -> Mapping[str, str]:
        """The base's name of each tensor in full (by key), LoRA and embedding (by its weight); raises if one is nowhere."""
        keys: dict[str, tuple[str, ...]] = {key: (key,) for key in files.full}
        keys |= {f"{name}.weight": (f"{name}.weight",) for name in files.tokens}
        keys |= {f"{layer.name}.weight": (f"{layer.name}.weight", f"{layer.name}.in_proj_weight") for layer in files.layers}
        first = next(iter(keys))
        if is_of_another_model(settings.base, self.title, self.checkpoint.config):
            self._refuse(adapter, first, f"is of {shown(settings.base)}, which is another model than {self.title}")
        buffers = [key for key in files.full if self._base(key) is None and key.rpartition(".")[2] in _BUFFERS]
        wanted = {key: options for key, options in keys.items() if key not in buffers}
        layers = {f"{layer.name}.weight": layer for layer in files.layers}

        def fits(index: int, name: str) -> bool:
            key, base = list(wanted)[index], self._base(name)
            assert base is not None
            if key in layers:
                return _misfit(layers[key], base) is None
            return key not in files.full or files.full[key].shape == base.shape

        def known(name: str) -> bool:
            return self._base(name) is not None

        try:
            rename = renaming(list(wanted.values()), known, list(self.checkpoint.tensors), fits)
        except CheckpointError as error:
            self._refuse(adapter, first, str(error))
        strange = next((key for key, options in wanted.items() if not any(map(known, options))), None)
        if strange is not None and (rename is None or is_of_another_maker(settings.base)):
            base = f"; it was trained on {shown(settings.base)}" if settings.base else ""
            self._refuse(adapter, strange, f"is none that {self.checkpoint.folder} has{base}")
        assert rename is not None
        return {key: next(name for name in map(rename, options) if known(name)) for key, options in wanted.items()}

    def _put_in_full(self, adapter: Adapter, name: str, key: str, tensor: CheckpointTensor) -> None:
        base = self._base(name)
        assert base is not None
        if tensor.shape != base.shape:
            resized = tensor.shape[1:] == base.shape[1:] and ("embed_tokens" in name or "lm_head" in name)
            why = "; its vocabulary was resized: build from the base with embeddings resized likewise" if resized else ""
            self._refuse(adapter, key, f"has shape {list(tensor.shape)}, but the base has {list(base.shape)}{why}")
        require_floats(tensor)
        name = self._place(name)
        if name in self.full and self.full[name][1] is not adapter:
            held, holder = self.full[name]
            if same_values(tensor, base):  # PEFT saves an embedding beside its LoRA
                return
            if not same_values(held.tensor, base):
                self._refuse(adapter, key, f"is held in full by {holder.name} too; only one of them can replace it")
        self.full[name] = (InFull(tensor, adapter.weight), adapter)

    def _put_layer(self, adapter: Adapter, settings: LoraSettings, layer: Layer, name_of: Mapping[str, str]) -> None:
        name = name_of[f"{layer.name}.weight"]
        base = self._base(name)
        assert base is not None
        some = f"{layer.name}.{next(iter(layer.parts))}"
        if not settings.targets(layer.wrapped):
            self._refuse(adapter, some, f"is of a layer that its {ADAPTER_CONFIG} leaves out; are they of two adapters?")
        embedding = any("embedding" in part for part in layer.parts)
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        wanted = {first, second, *(["lora_magnitude_vector"] if settings.magnitudes else [])}
        wanted |= {"lora_B.bias"} if settings.biased else set()
        if missing := sorted(wanted - layer.parts.keys()):
            self._refuse(adapter, some, f"has no {missing[0]} beside it; is the file whole?")
        if surplus := sorted(layer.parts.keys() - wanted):
            self._refuse(adapter, f"{layer.name}.{surplus[0]}", f"is more than its {ADAPTER_CONFIG} says")
        if (misfit := _misfit(layer, base)) is not None:
            self._refuse(adapter, *misfit)
        for tensor in (base, *layer.parts.values()):
            require_floats(tensor)
        a, b = layer.parts[first], layer.parts[second]
        if a.shape[0] != (rank := settings.rank_of(layer.wrapped)):
            self._refuse(adapter, f"{layer.name}.{first}", f"has rank {a.shape[0]}, but its {ADAPTER_CONFIG} says {rank}")
        scaling = settings.scaling(layer.wrapped) * adapter.weight
        if layer.name == f"{layer.wrapped}.out_proj":  # inside an attention: PEFT adds it twice, in training and in merging
            scaling *= 2
        lengths = layer.parts.get("lora_magnitude_vector")
        self.deltas.setdefault(self._place(name), []).append(LowRank(a, b, scaling, lengths, embedding))
        if settings.biased:
            beside = name.removesuffix("weight") + "bias"
            if self._base(beside) is None:
                self._refuse(adapter, f"{layer.name}.lora_B.bias", "is for a bias that the base has not")
            self.deltas.setdefault(beside, []).append(Bias(layer.parts["lora_B.bias"], scaling))

    def _put_rows(self, adapter: Adapter, settings: LoraSettings, embedding: str, tensor: CheckpointTensor, name: str) -> None:
        key = f"{embedding}.token_adapter.trainable_tokens_delta"
        base = self._base(name)
        assert base is not None
        ids = next((ids for end, ids in settings.tokens.items() if f".{embedding}".endswith(f".{end}" if end else "")), ())
        if tensor.shape != (len(ids), *base.shape[1:]) or max(ids, default=0) >= base.shape[0]:
            self._refuse(
                adapter, key, f"has shape {list(tensor.shape)}, for {len(ids)} trainable_token_indices of {list(base.shape)}"
            )
        require_floats(tensor)
        rows = self.rows.setdefault(self._place(name), [])
        if any(np.intersect1d(other.ids, ids).size for other in rows):
            self._refuse(adapter, key, "has tokens that another adapter has too; only one of them can replace them")
        rows.append(TokenRows(np.array(ids, np.int64), tensor, adapter.weight))

    def _require_saved(self, adapter: Adapter, settings: LoraSettings, found: set[str]) -> None:
        """Raise for a module that is to be saved in full but is not, or not whole."""
        for name in self.checkpoint.tensors:
            module, _, leaf = name.rpartition(".")
            if settings.saves(module) and name not in found and leaf not in _BUFFERS and not name.startswith(self.ignored):
                said = ", ".join(settings.saved)
                self._refuse(adapter, name, f"is missing, which its {ADAPTER_CONFIG} lists ({said}); is the file whole?")

    def _place(self, name: str) -> str:
        """Where a change goes: what is done to a head that is the embedding too is done to that."""
        tie = self.tie
        return tie.embedding if tie and name == tie.head and not self.separate_head else name

    def _refuse(self, adapter: Adapter, tensor: str, why: str) -> NoReturn:
        name = tensor if tensor.isprintable() else repr(tensor)
        raise CheckpointError(f"the adapter {adapter.name} cannot be merged: its tensor {name} {why}")


def _misfit(layer: Layer, base: CheckpointTensor) -> tuple[str, str] | None:
    """The part of a LoRA that does not fit the base's tensor, and why. Of a convolution, later axes count as one."""
    rows, columns = matrix_shape(base.shape)
    inner, outer = (rows, columns) if "lora_embedding_A" in layer.parts else (columns, rows)
    rank = next((part.shape[0] for name, part in layer.parts.items() if name.endswith("_A") and part.shape), 0)
    for name, part in layer.parts.items():
        flat = (part.shape[0] if part.shape else 0, math.prod(part.shape[1:]))
        if name.endswith("_A"):
            fits = flat == (rank, inner)
        elif name.endswith("_B"):
            fits = flat == (outer, rank)
        else:
            fits = math.prod(flat) == outer
        if not fits or not rank:
            return f"{layer.name}.{name}", f"has shape {list(part.shape)}, which does not fit the base's {list(base.shape)}"
    return None
