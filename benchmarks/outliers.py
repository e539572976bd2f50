"""A checkpoint of models/tiny that answers as before, with channels hundreds of times larger than the rest.

    python benchmarks/outliers.py OUT

Trained models of full size have such channels, a small one has not. After every norm that only linear layers read, in tower,
resampler and decoder, some channels are multiplied by 32 to 256 and the columns that read them are divided. Powers of two
leave every stored value exact, and the function what it was.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny" / "checkpoint"
FACTORS = (32.0, 64.0, 128.0, 256.0)


def readers(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, list[str]]]:
    """Each norm and the weights [out, in] that alone read it."""
    for name in tensors:
        if match := re.fullmatch(r"(vpm\.encoder\.layers\.\d+)\.layer_norm1\.weight", name):
            yield name.removesuffix(".weight"), [f"{match[1]}.self_attn.{one}_proj.weight" for one in "qkv"]
        elif match := re.fullmatch(r"(vpm\.encoder\.layers\.\d+)\.layer_norm2\.weight", name):
            yield name.removesuffix(".weight"), [f"{match[1]}.mlp.fc1.weight"]
        elif match := re.fullmatch(r"(llm\.model\.layers\.\d+)\.input_layernorm\.weight", name):
            yield name.removesuffix(".weight"), [f"{match[1]}.self_attn.{one}_proj.weight" for one in "qkv"]
        elif match := re.fullmatch(r"(llm\.model\.layers\.\d+)\.post_attention_layernorm\.weight", name):
            yield name.removesuffix(".weight"), [f"{match[1]}.mlp.{one}_proj.weight" for one in ("gate", "up")]
    yield "vpm.post_layernorm", ["resampler.kv_proj.weight"]
    yield "llm.model.norm", ["llm.lm_head.weight"]


def add_outliers(folder: Path, out: Path, *, channels: int = 4, seed: int = 0) -> Path:
    """Write the checkpoint in `folder` to `out`, `channels` of each norm enlarged."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for norm, weights in readers(tensors):
        width = len(tensors[f"{norm}.weight"])
        chosen = torch.randperm(width, generator=generator)[:channels]
        factors = torch.ones(width)
        factors[chosen] = torch.tensor([FACTORS[i % len(FACTORS)] for i in range(channels)])
        for name in {f"{norm}.weight", f"{norm}.bias"} & tensors.keys():
            tensors[name] = (tensors[name].float() * factors).to(tensors[name].dtype)
        for name in weights:
            tensors[name] = (tensors[name].float() / factors).to(tensors[name].dtype)
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    arguments = parser.parse_args()
    add_outliers(TINY, arguments.out, channels=arguments.channels)


if __name__ == "__main__":
    main()
