"""Write the tiny model's weights and configuration in MiniCPM-V 2.6's published layout, beside its tokenizer.

python models/tiny/published.py CHECKPOINT_FOLDER     (from the state that train.py left)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from batches import tiny_image_spec
from model import RESAMPLER, VISION, TinyModel
from safetensors.torch import save_file
from tokenizer import write_json
from tokenizers import Tokenizer
from torch import Tensor, nn

from mcv_graphs.layers import Linear


def write_checkpoint(folder: Path, model: TinyModel) -> None:
    """Weights in bfloat16 and configuration, beside the tokenizer that the model was trained with."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    save_file(published_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in configurations(model, tokenizer).items():
        write_json(folder / name, content)


def configurations(model: TinyModel, tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """config.json, generation_config.json and preprocessor_config.json, with the keys of the published ones."""
    image, decoder = tiny_image_spec(), model.decoder.config
    start, end, pad = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    config: dict[str, object] = {
        "version": 2.6,
        "architectures": ["MiniCPMV"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
            "AutoModel": "modeling_minicpmv.MiniCPMV",
            "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
        },
        "attention_dropout": 0.0,
        "bos_token_id": start,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.context_length,
        "max_window_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "sliding_window": decoder.context_length,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": decoder.vocab_size,
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "image_size": image.scale_resolution,
        "model_type": "minicpmv",
        "patch_size": image.patch_size,
        "query_num": RESAMPLER.num_queries,
        "slice_config": {"max_slice_nums": image.max_slice_nums, "patch_size": image.patch_size, "model_type": "minicpmv"},
        "slice_mode": True,
        "vision_config": {
            "hidden_size": VISION.hidden_size,
            "image_size": VISION.position_table_side * VISION.patch_size,
            "intermediate_size": VISION.intermediate_size,
            "model_type": "siglip",
            "num_attention_heads": VISION.num_heads,
            "num_hidden_layers": VISION.num_layers,
            "patch_size": VISION.patch_size,
        },
    }
    generation: dict[str, object] = {
        "bos_token_id": pad,
        "pad_token_id": pad,
        "do_sample": False,
        "eos_token_id": [end, pad],
        "repetition_penalty": 1.0,
        "transformers_version": "4.40.0",
    }
    preprocessor: dict[str, object] = {
        "image_processor_type": "MiniCPMVImageProcessor",
        "auto_map": {
            "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
            "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
        },
        "processor_class": "MiniCPMVProcessor",
        "max_slice_nums": image.max_slice_nums,
        "scale_resolution": image.scale_resolution,
        "patch_size": image.patch_size,
        "use_image_id": True,
        "image_feature_size": RESAMPLER.num_queries,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
        "slice_mode": True,
        "norm_mean": list(image.mean),
        "norm_std": list(image.std),
        "version": 2.6,
    }
    return {"config.json": config, "generation_config.json": generation, "preprocessor_config.json": preprocessor}


def published_tensors(model: TinyModel) -> dict[str, Tensor]:
    """The weights under their published names and shapes, in bfloat16."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, module: nn.Module) -> None:
        for leaf, value in module.named_parameters():
            tensors[f"{name}.{leaf}"] = rows_first(value) if isinstance(module, Linear) else value

    tower, resampler, decoder = model.tower, model.resampler, model.decoder
    size = VISION.patch_size
    put("vpm.embeddings.patch_embedding", tower.patch_embedding)
    tensors["vpm.embeddings.patch_embedding.weight"] = tower.patch_embedding.weight.T.reshape(-1, 3, size, size)
    tensors["vpm.embeddings.position_embedding.weight"] = tower.position_embedding.weight
    for number in range(VISION.num_layers):
        prefix = f"vpm.encoder.layers.{number}"
        for name in ("layer_norm1", "layer_norm2"):
            put(f"{prefix}.{name}", tower.get_submodule(f"layers.{number}.{name}"))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put(f"{prefix}.self_attn.{name}", tower.get_submodule(f"layers.{number}.{name}"))
        for name in ("fc1", "fc2"):
            put(f"{prefix}.mlp.{name}", tower.get_submodule(f"layers.{number}.{name}"))
    put("vpm.post_layernorm", tower.post_layernorm)

    tensors["resampler.query"] = resampler.query
    tensors["resampler.proj"] = resampler.proj.weight
    put("resampler.kv_proj", resampler.kv_proj)
    put("resampler.attn.out_proj", resampler.out_proj)
    for leaf in ("weight", "bias"):
        parts = [rows_first(resampler.get_parameter(f"{name}_proj.{leaf}")) for name in "qkv"]
        tensors[f"resampler.attn.in_proj_{leaf}"] = torch.cat(parts)
    for name in ("ln_q", "ln_kv", "ln_post"):
        put(f"resampler.{name}", resampler.get_submodule(name))

    tensors["llm.model.embed_tokens.weight"] = decoder.embed_tokens.weight
    config = decoder.config
    heads = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    for number in range(config.num_layers):
        prefix = f"llm.model.layers.{number}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            put(f"{prefix}.{name}", decoder.get_submodule(f"layers.{number}.{name}"))
        for leaf in ("weight", "bias"):
            packed = rows_first(decoder.get_parameter(f"layers.{number}.qkv_proj.{leaf}"))
            for name, part in zip("qkv", torch.split(packed, heads), strict=True):
                tensors[f"{prefix}.self_attn.{name}_proj.{leaf}"] = part
        put(f"{prefix}.self_attn.o_proj", decoder.get_submodule(f"layers.{number}.o_proj"))
        for name in ("gate_proj", "up_proj", "down_proj"):
            put(f"{prefix}.mlp.{name}", decoder.get_submodule(f"layers.{number}.{name}"))
    put("llm.model.norm", decoder.norm)
    put("llm.lm_head", decoder.lm_head)
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in sorted(tensors.items())}


def rows_first(value: Tensor) -> Tensor:
    """A linear's weight, held as [in, out], as it is published; its bias as it is."""
    return value.T if value.ndim == 2 else value


def main() -> None:
    state = torch.load(Path(__file__).parent / ".train" / "state.pt", weights_only=True)
    model = TinyModel(len(state["model"]["decoder.embed_tokens.weight"]))
    model.load_state_dict(state["model"])
    write_checkpoint(Path(sys.argv[1]), model)


if __name__ == "__main__":
    main()
