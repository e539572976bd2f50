"""A checkpoint of models/tiny that answers as before, with channels hundreds of times larger than the rest.

    python benchmarks/outliers.py OUT

Trained models of full size have such channels, a small one has not. Of what only linear layers read, in tower, resampler and
decoder, some channels are multiplied by 32 to 256 and the columns that read them are divided. Powers of two leave every stored
value exact, and the function what it was. `--kinds norms`: behind norms; `pairs`: between two linears (value and output of
attention, up and down of the decoder's MLP); by default both.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny" / "checkpoint"
FACTORS = (32.0, 64.0, 128.0, 256.0)


Kind = Literal["norms", "pairs"]


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Where a factor may go: `rows` [first, last) of `makers` are read by the `columns` of the `readers`, weights [out, in].

    Each of `columns` is one copy of all channels, from there on: the heads of grouped-query attention that share a value.
    """

    makers: tuple[str, ...]
    readers: tuple[str, ...]
    rows: tuple[int, int]
    columns: tuple[tuple[int, int], ...]


def channels_of(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], kinds: Collection[Kind]) -> Iterator[Channels]:
    """All places of a checkpoint in the layout of 2.6."""

    def norm(name: str, *readers: str) -> Channels:
        width = len(tensors[f"{name}.weight"])
        made = tuple(one for one in (f"{name}.weight", f"{name}.bias") if one in tensors)
        return Channels(makers=made, readers=tuple(f"{one}.weight" for one in readers), rows=(0, width), columns=((0, width),))

    def pair(maker: str, reader: str) -> Channels:
        rows = len(tensors[f"{maker}.weight"])
        made = tuple(one for one in (f"{maker}.weight", f"{maker}.bias") if one in tensors)
        return Channels(makers=made, readers=(f"{reader}.weight",), rows=(0, rows), columns=((0, rows),))

    for layer in sorted({match[0] for name in tensors if (match := re.match(r"llm\.model\.layers\.\d+", name))}):
        if "norms" in kinds:
            yield norm(f"{layer}.input_layernorm", *(f"{layer}.self_attn.{one}_proj" for one in "qkv"))
            yield norm(f"{layer}.post_attention_layernorm", f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        if "pairs" in kinds:
            yield pair(f"{layer}.mlp.up_proj", f"{layer}.mlp.down_proj")
            yield from _grouped_values(f"{layer}.self_attn", tensors, config)
    for layer in sorted({match[0] for name in tensors if (match := re.match(r"vpm\.encoder\.layers\.\d+", name))}):
        if "norms" in kinds:
            yield norm(f"{layer}.layer_norm1", *(f"{layer}.self_attn.{one}_proj" for one in "qkv"))
            yield norm(f"{layer}.layer_norm2", f"{layer}.mlp.fc1")
        if "pairs" in kinds:
            yield pair(f"{layer}.self_attn.v_proj", f"{layer}.self_attn.out_proj")
    if "norms" in kinds:
        yield norm("vpm.post_layernorm", "resampler.kv_proj")
        yield norm("llm.model.norm", "llm.lm_head")
    if "pairs" in kinds:
        width = len(tensors["resampler.query"][0])
        yield Channels(
            makers=("resampler.attn.in_proj_weight", "resampler.attn.in_proj_bias"),
            readers=("resampler.attn.out_proj.weight",),
            rows=(2 * width, 3 * width),
            columns=((0, width),),
        )


def _grouped_values(attention: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Iterator[Channels]:
    """Each head of values, and the heads of queries that read it."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = tensors[f"{attention}.o_proj.weight"].shape[1] // heads
    made = tuple(one for one in (f"{attention}.v_proj.weight", f"{attention}.v_proj.bias") if one in tensors)
    for head in range(kv_heads):
        readers = range(head * heads // kv_heads, (head + 1) * heads // kv_heads)
        yield Channels(
            makers=made,
            readers=(f"{attention}.o_proj.weight",),
            rows=(head * size, (head + 1) * size),
            columns=tuple((reader * size, (reader + 1) * size) for reader in readers),
        )


def add_outliers(folder: Path, out: Path, *, channels: int = 4, seed: int = 0, kinds: Collection[Kind] = ("norms",)) -> Path:
    """Write the checkpoint in `folder` to `out`, `channels` of each place enlarged."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for place in channels_of(tensors, json.loads((folder / "config.json").read_text()), kinds):
        first, last = place.rows
        chosen = torch.randperm(last - first, generator=generator)[:channels]
        factors = torch.ones(last - first)
        factors[chosen] = torch.tensor([FACTORS[i % len(FACTORS)] for i in range(channels)])
        for name in place.makers:
            rows = factors if tensors[name].ndim == 1 else factors[:, None]
            tensors[name][first:last] = (tensors[name][first:last].float() * rows).to(tensors[name].dtype)
        for name in place.readers:
            for begin, end in place.columns:
                tensors[name][:, begin:end] = (tensors[name][:, begin:end].float() / factors).to(tensors[name].dtype)
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    arguments = parser.parse_args()
    add_outliers(TINY, arguments.out, channels=arguments.channels, kinds=arguments.kinds)


if __name__ == "__main__":
    main()
