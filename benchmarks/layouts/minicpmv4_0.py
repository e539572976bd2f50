"""MiniCPM-V 4.0, 4.1 billion parameters (sizes as other runtimes state them)."""

from layouts import SO400M, Shapes, resampler_generation

TOKENIZER = "tests/golden/minicpmv4_0/checkpoint"

CONFIG = {
    "architectures": ["MiniCPMV"],
    "version": 4.0,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 73448,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [1.0] * 64,
        "original_max_position_embeddings": 32768,
    },
    "tie_word_embeddings": False,
    "query_num": 64,
    "patch_size": 14,
    "drop_vision_last_layer": False,
    "vision_config": SO400M,
}


def shapes() -> Shapes:
    """Name and shape of every tensor of the published layout."""
    return resampler_generation(CONFIG)
