"""Keys of config.json beside the decoder's constants: refused, ignored or warned about."""

from collections.abc import Collection, Mapping
from typing import Any, TypeGuard


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Metadata, training, old defaults of generation, numerics and speed.
_HARMLESS = _words(
    """
    architectures attn_implementation auto_map base_model chunk_size_feed_forward
    cross_attention_hidden_size dtype finetuning_task fused_linear_cross_entropy
    gradient_checkpointing id2label init_std initializer_factor initializer_range is_decoder
    is_llama_config label2id language library_name license max_position_embeddings max_seq_len
    max_seq_length max_sequence_length mlp_chunk_size model_max_length model_name n_ctx n_positions
    name_or_path neftune_noise_alpha num_labels output_attentions output_hidden_states prefix
    pretraining_tp problem_type prompt_format residual_in_fp32 return_dict router_aux_loss_coef
    seq_length tags task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class
    tokenizer_model_max_length tokenizer_padding_side torch_dtype torchscript transformers.js_config
    transformers_version use_bfloat16 use_cache use_flash_attention use_flash_attention_2
    use_flash_attn use_return_dict use_sdpa attention_softmax_in_fp32 logits_to_keep
    num_logits_to_keep z_loss_coefficient output_router_logits bos_token eos_token pad_token
    unk_token sep_token cls_token

    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bad_words_ids begin_suppress_tokens cache_config cache_implementation
    compile_config constraints continuous_batching_config disable_compile diversity_penalty
    do_sample dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids forced_decoder_ids
    generation_config guidance_scale is_assistant length_penalty low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens
    target_lookbehind temperature token_healing top_h top_k top_p typical_p use_mtp
    watermarking_config
    """
)
_HARMLESS_STARTS = ("_", "unsloth_")
_HARMLESS_ENDS = ("_token_id", "_token_ids")


_ROPE_OFF = (
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_factor", "long_factor",
    "low_freq_factor", "high_freq_factor", "mrope_section", "alpha", "full_attention",
    "sliding_attention",
)  # fmt: skip

# Keys that change the computation unless they are null, false, 0 or empty.
_OFF = _words(
    """
    attention_bias mlp_bias qkv_bias use_qkv_bias use_bias bias lm_head_bias o_proj_bias
    attention_out_bias attention_output_bias norm_bias add_bias_linear add_qkv_bias
    attn_logit_softcapping final_logit_softcapping attention_logit_softcapping logit_softcapping
    logits_soft_cap attn_soft_cap final_logits_soft_cap router_logit_softcapping
    qk_norm use_qk_norm qk_layer_norms qk_layernorm use_qk_layernorm q_norm k_norm query_key_norm
    qk_l2_norm
    use_post_norm use_sandwich_norm post_norm use_pre_norm norm_after sandwich_norm
    apply_residual_connection_post_layernorm use_layernorm zero_centered_gamma add_unit_offset
    clip_qkv alibi use_alibi rope_interleaved rope_interleave interleaved_rope rotary_interleaved
    no_rope_layers no_rope_layer_interval nope_layer_interval use_mrope
    use_dynamic_ntk use_logn_attn log_n_scaling attn_temperature_tuning floor_scale attn_scale
    attention_chunk_size sliding_window_pattern sliding_window_size window_size attention_window
    local_attention local_attention_window global_attn_every_n_layers attention_sink
    attention_sinks num_sink_tokens keep_window_size
    quantization_config quantization compression_config quantize bnb_config
    add_cross_attention is_encoder_decoder cross_attention_layers use_bidirectional_attention
    prefix_lm pruned_heads sparsity_config activation_sparsity_pattern per_layer_config
    num_experts num_local_experts n_routed_experts n_shared_experts num_shared_experts
    moe_num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size
    moe_topk moe_layers mlp_layer_types first_k_dense_replace use_moe is_moe
    enable_moe_block q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim
    use_parallel_residual parallel_attn parallel_attention parallel_block parallel_residual
    multi_query attention_k_eq_v num_kv_shared_layers cross_layer_attention
    hidden_size_per_layer_input altup_num_inputs laurel_rank use_double_wide_mlp
    mamba_d_state attn_layer_indices layers_block_type block_types linear_num_key_heads
    scale_embedding scale_embeddings embedding_scale scale_emb scale_depth dim_model_base
    mup_enabled use_mup mup_base_hidden_size normalize_embedding query_pre_attn_scalar
    attention_multiplier attention_value_scale learned_pos_emb vision_config audio_config
    text_config use_attention_gate attn_output_gate value_residual
    """
) | {f"rope parameter {key}" for key in _ROPE_OFF}

# Keys that change the computation unless they are 1 or null.
_ONE = _words(
    """
    partial_rotary_factor rotary_pct rotary_percent rotary_percentage embedding_multiplier
    residual_multiplier logits_scaling logit_scale logits_scale logits_multiplier
    lm_head_multiplier key_multiplier attention_in_multiplier attention_out_multiplier
    residual_scale routed_scaling_factor embed_scale rope_ratio rope_scaling_factor
    """
) | {f"rope parameter {key}" for key in ("factor", "attention_factor", "partial_rotary_factor")}

# Keys that change the computation unless they have one of these values.
_ACT = ("silu", "swish", None)
_EQUAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": _ACT,
    "activation_function": _ACT,
    "activation": _ACT,
    "mlp_hidden_act": _ACT,
    "is_causal": (True, None),
    "position_embedding_type": ("rope", "rotary", None),
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm", "rms", None),
    "rope parameter truncate": (True, None),
}


def show(value: Any) -> str:
    """Returns a value for a message, in one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def sort_keys(config: Mapping[str, Any], read: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the errors and the warnings about the keys that are not in `read`.

    A key that is known to change the computation is an error, unless its value changes nothing.
    A key that is not known is named in a warning.
    """
    problems, unknown, dropouts = [], [], []
    for key, value in config.items():
        if key in read:
            continue
        if key in _OFF or key in _ONE or key in _EQUAL:
            if wanted := _expected(key, value):
                problems.append(f"{key}: expected {wanted}, got {show(value)}")
        elif "dropout" in key or key.endswith(("_pdrop", "layerdrop")):
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                problems.append(f"{key}: expected a number from 0 to 1, got {show(value)}")
            elif value:
                dropouts.append(f"{key} {value}")
        elif not _is_harmless(key) and value is not None:
            unknown.append(f"{key} {show(value)}")
    warnings = []
    if unknown:
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        warnings.append(
            f"unknown keys: {', '.join(unknown[:20])}{more}. Assumed not to change what the model "
            "computes"
        )
    if dropouts:
        warnings.append(f"{', '.join(dropouts)}: dropout is not applied, not in training either")
    return problems, warnings


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expected(key: str, value: Any) -> str:
    """Returns the value that was expected, or "" if the value changes nothing."""
    if key in _EQUAL:
        fits = any(value is x or (isinstance(x, str) and value == x) for x in _EQUAL[key])
        return "" if fits else repr(_EQUAL[key][0])
    if key in _ONE:
        return "" if value is None or (is_number(value) and value == 1) else "1.0"
    return "" if not value else "none or false"


def _is_harmless(key: str) -> bool:
    known = key.startswith(_HARMLESS_STARTS) or key.endswith(_HARMLESS_ENDS)
    return known or key in _HARMLESS
