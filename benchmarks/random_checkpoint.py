"""Write a full-size MiniCPM-V checkpoint with random weights, shard by shard: real sizes, no download.

    python benchmarks/random_checkpoint.py minicpmv4_6 /data/random-4.6

Speed and memory depend on the sizes alone, so this is what the full-size benchmarks run on. The layouts are in
`benchmarks/layouts`; tokenizer and chat template are those of a small checkpoint. Every tensor is bf16, a shard at most 2 GB,
and memory stays at one shard.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import shutil
from pathlib import Path

import layouts
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
SHARD_VALUES = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(module.name for module in pkgutil.iter_modules(layouts.__path__)))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    layout = importlib.import_module(f"layouts.{arguments.family}")
    out: Path = arguments.out
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, out / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        print(f"{name}: {len(weight_map)} tensors so far", flush=True)

    for name, shape in layout.shapes():
        size = torch.Size(shape).numel()
        if shard and sum(tensor.numel() for tensor in shard.values()) + size > SHARD_VALUES:
            flush()
        # A norm's weight is about 1; a linear keeps the scale of what it is given.
        if len(shape) == 1:
            norm = name.endswith("weight") and ("norm" in name or ".ln_" in name)
            value = torch.ones(shape) if norm else torch.zeros(shape)
        else:
            value = torch.empty(shape, dtype=torch.bfloat16).normal_(0, (size // shape[0]) ** -0.5, generator=generator)
        shard[name] = value.bfloat16()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(layout.CONFIG, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (ROOT / layout.TOKENIZER / name).exists():
            shutil.copyfile(ROOT / layout.TOKENIZER / name, out / name)


if __name__ == "__main__":
    main()
