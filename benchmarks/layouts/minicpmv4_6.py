"""MiniCPM-V 4.6, 1.3 billion parameters."""

from layouts import Shapes, affine, siglip

TOKENIZER = "tests/golden/minicpmv4_6/checkpoint"

VISION = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
TEXT = {
    "model_type": "qwen3_5_text",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 248094,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
}
CONFIG = {
    "architectures": ["MiniCPMV4_6ForConditionalGeneration"],
    "model_type": "minicpmv4_6",
    "tie_word_embeddings": True,
    "insert_layer_id": 6,
    "drop_vision_last_layer": False,
    "image_token_id": 1512,  # of the small tokenizer
    "video_token_id": 1513,
    "vision_config": VISION,
    "text_config": TEXT,
}


def shapes() -> Shapes:
    """Name and shape of every tensor of the published layout."""
    hidden, ffn, head = TEXT["hidden_size"], TEXT["intermediate_size"], TEXT["head_dim"]
    value_heads = TEXT["linear_num_value_heads"]
    values = value_heads * TEXT["linear_value_head_dim"]
    channels = 2 * TEXT["linear_num_key_heads"] * TEXT["linear_key_head_dim"] + values
    yield "model.language_model.embed_tokens.weight", (TEXT["vocab_size"], hidden)
    for layer in range(TEXT["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            yield f"{prefix}.mlp.{name}_proj.weight", shape
        if (layer + 1) % TEXT["full_attention_interval"]:
            mixer = f"{prefix}.linear_attn"
            for name, rows in (("qkv", channels), ("z", values), ("a", value_heads), ("b", value_heads)):
                yield f"{mixer}.in_proj_{name}.weight", (rows, hidden)
            yield f"{mixer}.conv1d.weight", (channels, 1, TEXT["linear_conv_kernel_dim"])
            yield f"{mixer}.A_log", (value_heads,)
            yield f"{mixer}.dt_bias", (value_heads,)
            yield f"{mixer}.norm.weight", (TEXT["linear_value_head_dim"],)
            yield f"{mixer}.out_proj.weight", (hidden, values)
        else:
            mixer = f"{prefix}.self_attn"
            query, key = TEXT["num_attention_heads"] * head, TEXT["num_key_value_heads"] * head
            yield f"{mixer}.q_proj.weight", (2 * query, hidden)
            yield f"{mixer}.k_proj.weight", (key, hidden)
            yield f"{mixer}.v_proj.weight", (key, hidden)
            yield f"{mixer}.o_proj.weight", (hidden, query)
            yield f"{mixer}.q_norm.weight", (head,)
            yield f"{mixer}.k_norm.weight", (head,)
    yield "model.language_model.norm.weight", (hidden,)
    width, vision_ffn, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    tower = "model.vision_tower"
    yield from siglip(tower, width, vision_ffn, VISION["num_hidden_layers"], patch, VISION["image_size"] // patch)
    yield from affine(f"{tower}.vit_merger.layer_norm1", width)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from affine(f"{tower}.vit_merger.self_attn.{name}", width, width)
    yield from affine(f"{tower}.vit_merger.pre_norm", 4 * width)
    yield from affine(f"{tower}.vit_merger.linear_1", 4 * vision_ffn, 4 * width)
    yield from affine(f"{tower}.vit_merger.linear_2", width, 4 * vision_ffn)
    yield from affine("model.merger.mlp.0.pre_norm", 4 * width)
    yield from affine("model.merger.mlp.0.linear_1", 4 * width, 4 * width)
    yield from affine("model.merger.mlp.0.linear_2", hidden, 4 * width)
