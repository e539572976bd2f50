"""Published checkpoint layouts at full size: a module each, with the config and the names and shapes of all tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

SO400M = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
"""The vision tower of every family since 2.5."""

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def affine(name: str, out: int, into: int | None = None) -> Shapes:
    """Weight and bias of a linear, or of a norm."""
    yield f"{name}.weight", (out,) if into is None else (out, into)
    yield f"{name}.bias", (out,)


def siglip(tower: str, width: int, ffn: int, layers: int, patch: int, table_side: int) -> Shapes:
    """A SigLIP tower as transformers names it."""
    yield f"{tower}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{tower}.embeddings.patch_embedding.bias", (width,)
    yield f"{tower}.embeddings.position_embedding.weight", (table_side**2, width)
    for layer in range(layers):
        prefix = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from affine(f"{prefix}.{norm}", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{prefix}.self_attn.{name}", width, width)
        yield from affine(f"{prefix}.mlp.fc1", ffn, width)
        yield from affine(f"{prefix}.mlp.fc2", width, ffn)
    yield from affine(f"{tower}.post_layernorm", width)


def resampler_generation(config: Mapping[str, Any], *, qkv_bias: bool = False) -> Shapes:
    """MiniCPM-V 2.5 to 4.0: tower, resampler and a Llama-like decoder."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    vision = config["vision_config"]
    width, patch = vision["hidden_size"], vision["patch_size"]
    side = vision["image_size"] // patch
    yield from siglip("vpm", width, vision["intermediate_size"], vision["num_hidden_layers"], patch, side)
    yield "resampler.query", (config["query_num"], hidden)
    yield "resampler.kv_proj.weight", (hidden, width)
    yield "resampler.attn.in_proj_weight", (3 * hidden, hidden)
    yield "resampler.attn.in_proj_bias", (3 * hidden,)
    yield from affine("resampler.attn.out_proj", hidden, hidden)
    for norm in ("ln_q", "ln_kv", "ln_post"):
        yield from affine(f"resampler.{norm}", hidden)
    yield "resampler.proj", (hidden, hidden)
    yield "llm.model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"llm.model.layers.{layer}"
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            yield f"{prefix}.self_attn.{name}.weight", (count * head_dim, hidden)
            if qkv_bias:
                yield f"{prefix}.self_attn.{name}.bias", (count * head_dim,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim)
        for name, shape in (("gate_proj", (ffn, hidden)), ("up_proj", (ffn, hidden)), ("down_proj", (hidden, ffn))):
            yield f"{prefix}.mlp.{name}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (hidden,)
    yield "llm.model.norm.weight", (hidden,)
    yield "llm.lm_head.weight", (vocab, hidden)
