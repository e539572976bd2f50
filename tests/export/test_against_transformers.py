"""The merger generation in shapes that no golden checkpoint has, against transformers itself (a development dependency)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mcv_export.build import BuildOptions, build
from mcv_export.checkpoint import open_checkpoint
from mcv_export.eager import eager_module
from mcv_export.families import recognise
from mcv_runtime import Options, load

transformers = pytest.importorskip("transformers", minversion="5.18")

VISION = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 14,
    "image_size": 980, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
TEXT = {
    "model_type": "qwen3_5_text", "vocab_size": 1600, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 24, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "full_attention_interval": 2,
}  # fmt: skip
TOKENS = {"image_token_id": 1512, "video_token_id": 1513}
CASES = {
    # twice as many value heads as key heads, one key-value head for four, other widths of keys and values
    "value_heads": ("minicpmv4_6", {"insert_layer_id": 0}, {}),
    # the last layer is a delta net, A_log and the gated norm are kept in float32, the output head is its own
    "last_layer_linear": (
        "minicpmv4_6",
        {"insert_layer_id": 2, "tie_word_embeddings": False},
        {"layer_types": ["full_attention", *["linear_attention"] * 3], "tie_word_embeddings": False},
    ),
    # a canvas whose sections are the class default, longer than this head's rotary part
    "canvas": (
        "minicpmv4_7",
        {"insert_layer_id": 1, "image_start_id": 1534, "image_end_id": 1535, "slice_start_id": 1544, "slice_end_id": 1545,
         "newline_id": 198},
        {},
    ),
    # frequencies stretched by parts, and cosine and sine multiplied
    "yarn": (
        "minicpmv4_6",
        {"insert_layer_id": 1},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 4.0,
                             "original_max_position_embeddings": 64}},
    ),
    "ocr": ("minicpm_ocr", {"insert_layer_id": 1, "tie_word_embeddings": True}, {"num_key_value_heads": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, 700), np.linspace(0, 255, 500))
    picture = Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
    ImageDraw.Draw(picture).ellipse((90, 60, 400, 330), fill="white", outline="black", width=9)
    return picture


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, golden_root: Path):
    """A random model and its checkpoint folder."""
    family, top, text = CASES[request.param]
    config = transformers.AutoConfig.for_model(
        family, vision_config=VISION, text_config=TEXT | text, **TOKENS, **{"tie_word_embeddings": True} | top
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, 0, 0.7 * value[0].numel() ** -0.5)
            else:
                value.normal_(1.0 if name.endswith("norm.weight") and "linear_attn" in name else 0.0, 0.2)
            exact = value.bfloat16().float()
            value.copy_(exact)
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(golden_root / family / "checkpoint", folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for file in folder.glob("model*.safetensors"):
        file.unlink()
    mixed = {
        name: value if name.endswith(("A_log", "linear_attn.norm.weight")) else value.bfloat16()
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=mixed)
    return model, folder


def expected_logits(model, prompt, sliced, mode):
    pieces = [piece for picture in sliced for piece in picture.slices]
    strips = [
        (np.asarray(p, np.float32) / 255 * 2 - 1).transpose(2, 0, 1).reshape(3, p.height // 14, 14, p.width // 14, 14)
        for p in pieces
    ]
    inputs = {
        "input_ids": torch.from_numpy(prompt.ids)[None],
        "pixel_values": torch.from_numpy(np.concatenate([s.transpose(0, 2, 1, 3, 4).reshape(3, 14, -1) for s in strips], -1))[
            None
        ],
        "target_sizes": torch.tensor([[p.height // 14, p.width // 14] for p in pieces]),
        "downsample_mode": mode,
        "use_cache": False,
    }
    if prompt.positions is not None:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == TOKENS["image_token_id"]).int()
    with torch.inference_mode():
        return model(**inputs).logits[0, -1].numpy()


@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_logits(model, picture, mode, tmp_path, read_prompt):
    reference, folder = model
    engine = load(build(folder, tmp_path / "bundle", BuildOptions(precision="fp32")).folder, threads=1)
    request = [{"role": "user", "content": [picture, "What is it?"]}]
    options = {"downsample_mode": mode, "max_slice_nums": 2}
    prompt = engine.prompt(request, **options)
    sliced = [part for message in engine._preparer.sliced(request, Options(**options)) for part in message.pictures]
    expected = expected_logits(reference, prompt, sliced, mode)

    (encoded,) = engine._vision.encode(sliced)
    (found,) = read_prompt(engine, prompt, encoded.embeds)[-1]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    # and the eager body, from the same checkpoint
    plan = recognise(json.loads((folder / "config.json").read_text())).plan(open_checkpoint(folder)).graphs[-1]
    module = eager_module(plan, open_checkpoint(folder))
    length = len(prompt.ids)
    positions = np.arange(length)[None] if prompt.positions is None else prompt.positions[:, None]
    past = [torch.zeros([{"batch": 1, "cache_length": 0}.get(n, n) for n in entry.shape]) for entry in plan.io.cache]
    unused = torch.zeros(1, dtype=torch.int32)
    arrays = (prompt.ids[None], encoded.embeds.copy(), prompt.visual_positions, positions, np.array([length - 1]))
    with torch.inference_mode():
        eager, _ = module(*map(torch.from_numpy, arrays), unused, unused, past)
    np.testing.assert_allclose(eager[0].numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
