"""Every key of a checkpoint's configuration is read by its family, or stands here with a reason, or is refused.

A key that nobody weighed may be one that changes every answer (a scaled rotary base, a bias, a window).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mcv_export.checkpoint import Checkpoint
from mcv_runtime.errors import CheckpointError, shown

_WITHOUT_EFFECT: Mapping[str, str] = {
    "says who wrote the file, and for which class": """
        _name_or_path name_or_path architectures auto_map custom_pipelines model_type transformers_version unsloth_version
        unsloth_fixed tokenizer_class processor_class image_processor_type video_processor_type feature_extractor_type
        _from_model_config _commit_hash version finetuning_task task_specific_params problem_type base_model_name_or_path
    """,
    "is for training": """
        attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob activation_dropout dropout
        embd_pdrop resid_pdrop attn_pdrop classifier_dropout classifier_dropout_prob initializer_range initializer_factor
        gradient_checkpointing label_smoothing id2label label2id num_labels output_router_logits residual_dropout
        train_dtype model_max_length tokenizer_model_max_length tokenizer_padding_side
    """,
    "says in which numbers the reference computes; a bundle has its own precision": """
        torch_dtype dtype use_bfloat16 fp16 bf16 fp32 mamba_ssm_dtype _pre_quantization_dtype
    """,
    "says how the reference runs, not what it computes": """
        use_cache cache_implementation use_return_dict return_dict return_dict_in_generate output_attentions
        output_hidden_states output_scores output_logits torchscript tf_legacy_loss attn_implementation
        _attn_implementation _attn_implementation_internal _attn_implementation_autoset _flash_attn_2_enabled
        use_flash_attn use_flash_attention_2 flash_attn pretraining_tp chunk_size_feed_forward batch_vision_input
        vision_batch_size is_decoder prefix cross_attention_hidden_size device disable_grouping
        return_tensors input_data_format data_format num_return_sequences disable_compile compile_config cache_config
        max_cache_len low_memory prefill_chunk_size is_assistant num_assistant_tokens num_assistant_tokens_schedule
        assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit
        assistant_lookbehind target_lookbehind speculation_type use_mtp continuous_batching_config return_metadata
        experts_implementation _experts_implementation keys_to_ignore_at_inference
    """,
    "is said by tokenizer.json": """
        bos_token_id pad_token_id sep_token_id unk_token_id cls_token_id decoder_start_token_id im_start_token_id
        im_end_token_id slice_start_token_id slice_end_token_id im_id_start_token_id im_id_end_token_id
        image_start_token_id image_end_token_id eos_token_id
    """,
    "describes what a bundle does without: draft layers, a pooling head, the size of unsliced training pictures": """
        mtp_num_hidden_layers mtp_use_dedicated_embeddings num_nextn_predict_layers vision_use_head projection_dim
        image_size
    """,
    "belongs to an object that has no use for it": "tie_word_embeddings",
    "is a choice of each request: greedy, unless it says otherwise": """
        do_sample temperature top_k top_p min_p num_beams length_penalty early_stopping max_length max_time
        diversity_penalty num_beam_groups
    """,
    "is what the published image processor derives from other keys, or hands on without reading": """
        im_start_token im_end_token slice_start_token slice_end_token unk_token size crop_size default_to_square
        model_input_names backend video_metadata return_row_col_info
    """,
}
"""The keys that no graph and no manifest needs, by reason."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # networks that differ from the ones that mcv builds
    "attention_bias": (False,), "mlp_bias": (False,), "attention_out_bias": (False,), "use_sliding_window": (False,),
    "add_cross_attention": (False,), "is_encoder_decoder": (False,), "tie_encoder_decoder": (False,), "pruned_heads": ({},),
    "mlp_only_layers": ([],), "num_experts": (0,), "num_local_experts": (0,), "attn_output_gate": (False,),
    "logits_scaling": (1,), "logit_scale": (1,), "embedding_multiplier": (1,), "residual_multiplier": (1,),
    "scale_emb": (1,), "scale_depth": (1,), "partial_rotary_factor": (1,), "final_logit_softcapping": (0,),
    "attn_logit_softcapping": (0,), "mm_use_im_start_end": (True,), "drop_vision_last_layer": (False,),
    "use_mrope": (False,), "is_causal": (True,), "use_lora": (False,),
    # pictures
    "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,), "do_convert_rgb": (True,), "do_center_crop": (False,),
    "do_pad": (False,), "rescale_factor": (1 / 255,), "resample": (3, "bicubic"), "do_sample_frames": (True,),
    # answers
    "min_length": (0,), "min_new_tokens": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "repetition_penalty": (1,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "guidance_scale": (1,), "penalty_alpha": (0,), "bad_words_ids": ([],), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "sequence_bias": ({},), "stop_strings": ([],), "remove_invalid_values": (False,),
    "renormalize_logits": (False,), "token_healing": (False,),
}  # fmt: skip
"""The keys that change nothing at these values alone."""

_ARBITRARY = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
"""Files whose other keys are a tokenizer's arguments: tokenizer.json, which a bundle keeps, has their effect."""

_REASONS = {key: reason for reason, keys in _WITHOUT_EFFECT.items() for key in keys.split()}


def refuse_unread(checkpoint: Checkpoint, left_out: Collection[str] = ()) -> None:
    """Raise `CheckpointError` for the first key that nobody read and that may matter.

    `left_out` are beginnings of keys of what the family leaves out, speech for example.
    """
    files = [checkpoint.config, *(one for name, one in checkpoint.opened.items() if name not in _ARBITRARY)]
    for config in files:
        for key, path, value in config.unread():
            found = f"{config.file} has {path}={shown(value)}"
            if key in _NEUTRAL:
                if value not in _NEUTRAL[key]:
                    raise CheckpointError(f"{found}; of this family mcv knows {_NEUTRAL[key][0]!r} only")
            elif key not in _REASONS and not key.startswith(tuple(left_out)):
                raise CheckpointError(
                    f"{found}, a key that mcv does not know and that may change the answers; "
                    "if it has no effect on the model, remove it from the file"
                )
