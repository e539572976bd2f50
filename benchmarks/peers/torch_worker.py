"""torch in the race: transformers' decoder and tower of the shape, in bf16 where the processor has it, else in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_decoder
import protocol
import torch
from shapes import Shape


def floats() -> torch.dtype:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def prepare(settings: dict[str, Any]) -> None:
    """Random weights are made where they are needed."""


class Torch:
    def __init__(self, settings: dict[str, Any]) -> None:
        needed = sum(path.stat().st_size for path in Path(settings["checkpoint"]).glob("*.safetensors"))
        needed *= 3 if floats() == torch.float32 else 2
        if (free := _free_bytes()) < needed:
            raise RuntimeError(f"{needed >> 20:,} MB of memory are needed, {free >> 20:,} are free")
        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        self._shape, self._checkpoint = Shape.of(settings["checkpoint"]), settings["checkpoint"]
        self.vocabulary = self._shape.vocab
        self._decoder = hf_decoder.random_model(self._shape).to(floats())
        self._cache: Any = None
        self._tower = self._merging_tower() if not self._shape.queries else self._plain_tower()

    def restart(self) -> None:
        self._cache = None

    def read(self, ids: list[int]) -> None:
        output = self._decoder(input_ids=torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values

    def step(self, token: int) -> None:
        self.read([token])

    def look(self) -> None:
        self._tower()

    def _plain_tower(self) -> Any:
        """A SigLIP of the shape, without the resampler behind it (3 % of the work)."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        sizes = {key: value for key, value in self._shape.tower.items() if key != "image_size"}
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=448, vision_use_head=False)).to(floats()).eval()
        pixels = torch.rand(1, 3, 448, 448).to(floats())
        return lambda: tower(pixel_values=pixels)

    def _merging_tower(self) -> Any:
        """The published tower and merger."""
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(self._checkpoint, dtype=floats()).model
        del model.language_model
        patch = self._shape.tower["patch_size"]
        pixels = torch.rand(1, 3, patch, patch * 1024)
        return lambda: model.get_image_features(pixels, target_sizes=torch.tensor([[32, 32]]))


def _free_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


if __name__ == "__main__":
    protocol.main(Torch, prepare, Torch)
