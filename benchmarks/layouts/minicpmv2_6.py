"""MiniCPM-V 2.6, 8.1 billion parameters."""

from layouts import SO400M, Shapes, resampler_generation

TOKENIZER = "models/tiny/checkpoint"

CONFIG = {
    "architectures": ["MiniCPMV"],
    "version": 2.6,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 151666,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "query_num": 64,
    "patch_size": 14,
    "drop_vision_last_layer": False,
    "vision_config": SO400M,
}


def shapes() -> Shapes:
    """Name and shape of every tensor of the published layout."""
    return resampler_generation(CONFIG, qkv_bias=True)
