"""GGUF files of a shape with random weights in 16-bit floats: a decoder, and the tower with what compresses its patches.

Names and keys are those that llama.cpp's loaders read (src/models and tools/mtmd of the release that `environments.py` pins).
The vocabulary is made up: bytes, the marks around pictures, and filling.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from shapes import Shape

Tensors = Iterator[tuple[str, tuple[int, ...]]]
MARKS = ("<image>", "</image>", "<slice>", "</slice>")
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3_5": "qwen35"}
VERSIONS = {"llama": 5, "qwen2": 3}
"""Of the resampler's families, as llama.cpp counts them: 4.0 and 2.6."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_decoder(shape: Shape, path: Path) -> None:
    arch = ARCHITECTURES[shape.decoder]
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "context_length": 4096,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.rotated,
        "vocab_size": shape.vocab,
    }
    if shape.decoder == "qwen3_5":
        text = shape.text
        numbers |= {
            "ssm.conv_kernel": text["linear_conv_kernel_dim"],
            "ssm.state_size": text["linear_key_head_dim"],
            "ssm.group_count": text["linear_num_key_heads"],
            "ssm.time_step_rank": text["linear_num_value_heads"],
            "ssm.inner_size": text["linear_num_value_heads"] * text["linear_value_head_dim"],
            "full_attention_interval": _interval(text),
        }
        half = shape.rotated // 2
        writer.add_array(f"{arch}.rope.dimension_sections", [(half + 2) // 3, (half + 1) // 3, half // 3, 0])
    for key, number in numbers.items():
        writer.add_uint32(f"{arch}.{key}", number)
    writer.add_float32(f"{arch}.rope.freq_base", shape.rope_theta)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *MARKS]
    words += [f"word{number}" for number in range(len(words), shape.vocab)]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[USER_DEFINED] * len(MARKS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words[: shape.vocab])
    writer.add_token_scores([0.0] * shape.vocab)
    writer.add_token_types((kinds + [NORMAL] * shape.vocab)[: shape.vocab])
    _write(writer, decoder_tensors(shape))


def decoder_tensors(shape: Shape) -> Tensors:
    hidden, text = shape.hidden, shape.text
    yield "token_embd.weight", (shape.vocab, hidden)
    yield "output_norm.weight", (hidden,)
    if not shape.tied:
        yield "output.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,)
        yield f"{block}.{'post_attention_norm' if shape.decoder == 'qwen3_5' else 'ffn_norm'}.weight", (hidden,)
        if shape.decoder == "qwen3_5" and (layer + 1) % _interval(text):
            keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
            heads, values = text["linear_num_value_heads"], text["linear_num_value_heads"] * text["linear_value_head_dim"]
            yield f"{block}.attn_qkv.weight", (2 * keys + values, hidden)
            yield f"{block}.attn_gate.weight", (values, hidden)
            yield f"{block}.ssm_conv1d.weight", (2 * keys + values, text["linear_conv_kernel_dim"])
            yield f"{block}.ssm_dt.bias", (heads,)
            yield f"{block}.ssm_a", (heads,)
            yield f"{block}.ssm_beta.weight", (heads, hidden)
            yield f"{block}.ssm_alpha.weight", (heads, hidden)
            yield f"{block}.ssm_norm.weight", (text["linear_value_head_dim"],)
            yield f"{block}.ssm_out.weight", (hidden, values)
        else:
            query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
            gated = shape.decoder == "qwen3_5"
            for name, rows in (("q", 2 * query if gated else query), ("k", key), ("v", key)):
                yield f"{block}.attn_{name}.weight", (rows, hidden)
                if shape.decoder == "qwen2":
                    yield f"{block}.attn_{name}.bias", (rows,)
            yield f"{block}.attn_output.weight", (hidden, query)
            if gated:
                yield f"{block}.attn_q_norm.weight", (shape.head_dim,)
                yield f"{block}.attn_k_norm.weight", (shape.head_dim,)
        yield f"{block}.ffn_gate.weight", (shape.ffn, hidden)
        yield f"{block}.ffn_up.weight", (shape.ffn, hidden)
        yield f"{block}.ffn_down.weight", (hidden, shape.ffn)


def write_tower(shape: Shape, path: Path) -> None:
    tower = shape.tower
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "resampler" if shape.queries else "minicpmv4_6")
    numbers = {
        "image_size": 448,
        "patch_size": tower["patch_size"],
        "embedding_length": tower["hidden_size"],
        "feed_forward_length": tower["intermediate_size"],
        "block_count": tower["num_hidden_layers"],
        "attention.head_count": tower["num_attention_heads"],
        "projection_dim": shape.hidden,
    }
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    if shape.queries:
        writer.add_int32("clip.minicpmv_version", VERSIONS[shape.decoder])
        writer.add_uint32("clip.minicpmv_query_num", shape.queries)
    else:
        writer.add_uint32("clip.vision.projector.scale_factor", 4)
        writer.add_array("clip.vision.wa_layer_indexes", [shape.merge_after])
    _write(writer, tower_tensors(shape))


def tower_tensors(shape: Shape) -> Tensors:
    tower, hidden = shape.tower, shape.hidden
    width, ffn, patch = tower["hidden_size"], tower["intermediate_size"], tower["patch_size"]
    yield "v.patch_embd.weight", (width, 3, patch, patch)
    yield "v.patch_embd.bias", (width,)
    yield "v.position_embd.weight", ((tower["image_size"] // patch) ** 2, width)
    yield from _affine("v.post_ln", width)
    for layer in range(tower["num_hidden_layers"]):
        block = f"v.blk.{layer}"
        for name, out, into in (("ln1", width, 0), ("ln2", width, 0), ("ffn_up", ffn, width), ("ffn_down", width, ffn)):
            yield from _affine(f"{block}.{name}", out, into)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from _affine(f"{block}.{name}", width, width)
    if shape.queries:
        yield "resampler.pos_embed_k", (4900, hidden)
        yield "resampler.query", (shape.queries, hidden)
        yield "resampler.proj.weight", (hidden, hidden)
        yield "resampler.kv.weight", (hidden, width)
        for name in ("q", "k", "v", "out"):
            yield from _affine(f"resampler.attn.{name}", hidden, hidden)
        for name in ("q", "kv", "post"):
            yield from _affine(f"resampler.ln_{name}", hidden)
        return
    yield from _affine("v.vit_merger.ln1", width)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        yield from _affine(f"v.vit_merger.{name}", width, width)
    yield from _affine("v.vit_merger.ds_ln", 4 * width)
    yield from _affine("v.vit_merger.ds_ffn_up", 4 * ffn, 4 * width)
    yield from _affine("v.vit_merger.ds_ffn_down", width, 4 * ffn)
    yield from _affine("mm.input_norm", 4 * width)
    yield from _affine("mm.up", 4 * width, 4 * width)
    yield from _affine("mm.down", hidden, 4 * width)


def _affine(name: str, out: int, into: int = 0) -> Tensors:
    yield f"{name}.weight", (out, into) if into else (out,)
    yield f"{name}.bias", (out,)


def _interval(text: dict[str, Any]) -> int:
    """Every so many layers there is one of full attention."""
    if "layer_types" in text:
        return int(text["layer_types"].index("full_attention")) + 1
    return int(text.get("full_attention_interval", 4))


def _write(writer: gguf.GGUFWriter, tensors: Tensors) -> None:
    """Matrices in float16, the rest in float32; one tensor at a time is in memory."""
    drawn = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    kept = list(tensors)
    for name, size in kept:
        dtype = _dtype(name, size)
        writer.add_tensor_info(name, size, dtype, int(np.prod(size)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size in kept:
        dtype = _dtype(name, size)
        if len(size) == 1:
            ones = name.endswith("weight")
            value = np.full(size, 1.0 if ones else -0.1 if name.endswith("ssm_a") else 0.0, dtype)
        else:
            value = np.resize((drawn * size[-1] ** -0.5).astype(dtype), size)
        writer.write_tensor_data(value)
    writer.close()


def _dtype(name: str, size: tuple[int, ...]) -> np.dtype[Any]:
    full = len(size) == 1 or any(part in name for part in ("position_embd", "pos_embed_k", "resampler.query", "conv1d"))
    return np.dtype(np.float32 if full else np.float16)
