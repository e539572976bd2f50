"""OmniLMM, of which there are no golden data: a random small checkpoint against timm's tower and transformers' Mistral."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from mcv_export.build import BuildOptions, build
from mcv_runtime import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # timm's
if not importlib.util.find_spec("timm"):
    pytest.skip("timm is not installed", allow_module_level=True)

SIDE, WIDTH, HIDDEN, QUERIES, GRID = 280, 64, 256, 16, 20
CLIP = [(0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)]


def _timm() -> Any:
    """timm, whose picture transforms (unused here) want a torchvision built for the installed torch."""
    parts = ("transforms", "transforms.functional", "datasets", "ops", "ops.misc", "models", "models.feature_extraction")
    for name in ("", *(f".{part}" for part in parts)):
        module = types.ModuleType(f"torchvision{name}")
        module.__getattr__ = lambda attribute: MagicMock() if not attribute.startswith("__") else None  # type: ignore[method-assign]
        module.__path__ = []  # type: ignore[attr-defined]
        sys.modules.setdefault(f"torchvision{name}", module)
    import timm

    return timm


class Nothing(nn.Module):
    """In the place of the last block, as published."""

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    stubs = {name for name in sys.modules if name.startswith("torchvision")}
    timm = _timm()
    model = timm.create_model(
        "eva02_enormous_patch14_clip_224.laion2b_plus", pretrained=False, num_classes=0, dynamic_img_size=True,
        dynamic_img_pad=True, embed_dim=WIDTH, depth=3, mlp_ratio=2.5,
    )  # fmt: skip
    for name in [name for name in sys.modules if name.startswith("torchvision") and name not in stubs]:
        del sys.modules[name]
    model.blocks[-1] = Nothing()
    return model.eval()


@pytest.fixture(scope="module")
def language_model() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=703, hidden_size=HIDDEN, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, rope_theta=10000.0, rms_norm_eps=1e-5, sliding_window=None,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(
    tower: nn.Module, language_model: Any, golden_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("omnilmm")
    shapes = {
        "query": (QUERIES, HIDDEN), "pos_embed": (QUERIES, HIDDEN), "proj": (HIDDEN, HIDDEN), "kv_proj.weight": (HIDDEN, WIDTH),
        "attn.in_proj_weight": (3 * HIDDEN, HIDDEN), "attn.in_proj_bias": (3 * HIDDEN,),
        "attn.out_proj.weight": (HIDDEN, HIDDEN), "attn.out_proj.bias": (HIDDEN,),
        **{f"{norm}.{kind}": (HIDDEN,) for norm in ("ln_q", "ln_kv", "ln_post") for kind in ("weight", "bias")},
    }  # fmt: skip
    state = {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    state |= language_model.state_dict()
    state |= {f"model.resampler.{name}": torch.empty(shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        noise = torch.empty(value.shape).normal_(0, 0.3 if value.ndim == 1 else value.shape[-1] ** -0.5, generator=generator)
        state[name] = noise + 1 if value.ndim == 1 and name.endswith("weight") else noise
    tower.load_state_dict({k.removeprefix("model.vision_tower."): v for k, v in state.items() if "vision_tower" in k})
    language_model.load_state_dict({k: v for k, v in state.items() if "vision_tower" not in k and "resampler" not in k})
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    config = language_model.config.to_dict()
    config |= {"architectures": ["OmniLMMForCausalLM"], "num_query": QUERIES, "image_size": SIDE, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_parameters"}))
    tokenizer = json.loads((golden_root / "minicpmv2_0" / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, content in enumerate(("<im_patch>", "<im_start>", "<im_end>"), start=700):
        tokenizer["added_tokens"].append({"id": number, "content": content, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}<|assistant|>\n"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    return folder, state


def _pixels(picture: Image.Image) -> torch.Tensor:
    pixels = torch.tensor(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP)
    return (pixels - mean) / std


def test_tokens_equal_those_of_timm_and_transformers(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], tower: Any, language_model: Any, golden_root: Path, tmp_path: Path
) -> None:
    folder, state = checkpoint
    engine = load(build(folder, tmp_path / "bundle", BuildOptions(precision="fp32")).folder, threads=1)
    with Image.open(golden_root / "images" / "synth_300x200.png") as opened:
        picture = opened.convert("RGB")
    part = {name.removeprefix("model.resampler."): value for name, value in state.items() if "resampler" in name}
    with torch.no_grad():
        features = tower.forward_features(_pixels(picture)[None])[:, 1:]
        attention = nn.MultiheadAttention(HIDDEN, HIDDEN // 128, batch_first=True)
        attention.load_state_dict({name.removeprefix("attn."): part[name] for name in part if name.startswith("attn.")})

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(x, (HIDDEN,), part[f"{name}.weight"], part[f"{name}.bias"], 1e-6)

        values = norm(features @ part["kv_proj.weight"].T, "ln_kv")
        grid = part["pos_embed"].view(1, 4, 4, HIDDEN).permute(0, 3, 1, 2)
        positions = F.interpolate(grid, (GRID, GRID), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
        queries = norm(part["query"], "ln_q") + part["pos_embed"]
        attended, _ = attention(queries[None], values + positions, values)
        visual = norm(attended, "ln_post")[0] @ part["proj"]
        found = engine.encode_image(picture).embeds
        np.testing.assert_allclose(found, visual.numpy(), rtol=0, atol=1e-4)
        prompt = engine.prompt([{"role": "user", "content": [picture, "What is this?"]}])
        embeds = language_model.get_input_embeddings()(torch.from_numpy(prompt.ids))
        embeds[torch.from_numpy(prompt.visual_positions)] = visual
        expected = language_model.generate(
            inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)), max_new_tokens=16, do_sample=False,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    assert prompt.text.startswith("<|system|>\nYou are an artificial intelligence assistant")
    assert f"<|user|>\n<im_start>{'<im_patch>' * QUERIES}<im_end>\nWhat is this?</s>" in prompt.text
    answer = engine.ask(picture, "What is this?", max_new_tokens=16, repetition_penalty=1.0)
    assert list(answer.tokens) == expected[0].tolist()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert answer.text == tokenizer.decode(expected[0].tolist(), skip_special_tokens=True).strip()
