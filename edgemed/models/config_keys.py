"""Keys that config.json may have whatever the architecture: what other modules read, and what is
harmless, each with its reason.

transformers writes many keys into a config that change nothing a decoder computes, and training
tools add theirs. A family adds to these lists what its own configs have.
"""

from __future__ import annotations

from edgemed.models.config_reader import REQUIRED, ConfigKeys

TRAINED = "says how the model was trained"
DROPOUT = "dropout is for training"
START = "says how weights begin before training"
ANSWERED = "what a forward call returns, not what it computes"
CODE = "names the code or file the model comes from"
HEAD = "the head is read from the tensors"
SPEED = "another way to compute the same"
GENERATION = (
    "how text is chosen is decided where it is generated; generation_config.json comes first"
)
TOKENIZER = "the tokenizer's own files say it"
ENCODER = "of models with an encoder, which these are not"

ELSEWHERE = {
    "model_type": "models/architecture.py",
    "quantization_config": "models/weights.py",
    "edgemed_random_weights": "models/random_weights.py",
    "edgemed_adapter": "models/checkpoint.py",
    "edgemed_folded": "models/lora.py",
    "bos_token_id": "who writes it into an engine",
}

# Parameters of generation that transformers wrote into config.json until version 5.
GENERATION_KEYS = dict.fromkeys(
    (
        *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "early_stopping"),
        *("do_sample", "num_beams", "num_beam_groups", "diversity_penalty", "temperature"),
        *("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "penalty_alpha"),
        *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "renormalize_logits"),
        *("num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate"),
        *("use_mtp", "cache_implementation", "cache_config", "max_cache_len", "max_time"),
        *("top_h", "low_memory", "token_healing", "is_assistant", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("speculation_type", "compile_config", "disable_compile", "prefill_chunk_size"),
        *("continuous_batching_config", "dola_layers", "remove_invalid_values"),
        "exponential_decay_length_penalty",
    ),
    GENERATION,
)

# They change which tokens may follow. edgemed generates without them.
CONSTRAINTS: dict[str, tuple[object, ...]] = {
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}, []),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None, []),
}

HARMLESS = GENERATION_KEYS | {
    # transformers' PreTrainedConfig, today's and former fields
    "transformers_version": CODE,
    "architectures": "the class that wrote it; model_type decides",
    "_name_or_path": CODE,
    "name_or_path": CODE,
    "_commit_hash": CODE,
    "auto_map": CODE,
    "custom_pipelines": CODE,
    "dtype": "each tensor's own dtype is read",
    "torch_dtype": "each tensor's own dtype is read",
    "use_bfloat16": "each tensor's own dtype is read",
    "output_hidden_states": ANSWERED,
    "output_attentions": ANSWERED,
    "output_router_logits": ANSWERED,
    "return_dict": ANSWERED,
    "torchscript": ANSWERED,
    "use_cache": SPEED,
    "use_return_dict": ANSWERED,
    "chunk_size_feed_forward": SPEED,
    "attn_implementation": SPEED,
    "_attn_implementation": SPEED,
    "_attn_implementation_autoset": SPEED,
    "_attn_implementation_internal": SPEED,
    "_experts_implementation_internal": SPEED,
    "_flash_attn_2_enabled": SPEED,
    "use_flash_attn": SPEED,
    "use_flash_attention_2": SPEED,
    "flash_attn": SPEED,
    "fused_mlp": SPEED,
    "flash_rotary": SPEED,
    "fused_dense": SPEED,
    "pretraining_tp": SPEED,
    "gradient_checkpointing": TRAINED,
    "is_decoder": "every model here decodes",
    "cross_attention_hidden_size": ENCODER,
    "tie_encoder_decoder": ENCODER,
    "decoder_start_token_id": ENCODER,
    "id2label": HEAD,
    "label2id": HEAD,
    "num_labels": HEAD,
    "problem_type": HEAD,
    "finetuning_task": TRAINED,
    "task_specific_params": "parameters of generation for single tasks",
    "tokenizer_class": TOKENIZER,
    "prefix": TOKENIZER,
    "pad_token_id": "no padding is computed",
    "sep_token_id": TOKENIZER,
    "unk_token_id": TOKENIZER,
    "tf_legacy_loss": TRAINED,
    "initializer_range": START,
    "attention_dropout": DROPOUT,
    "attn_pdrop": DROPOUT,
    "embd_pdrop": DROPOUT,
    "resid_pdrop": DROPOUT,
    "hidden_dropout": DROPOUT,
    "classifier_dropout": DROPOUT,
    "dropout": DROPOUT,
    "summary_first_dropout": DROPOUT,
    # of training tools and publishers
    "unsloth_fixed": TRAINED,
    "unsloth_version": TRAINED,
    "unsloth_training_dtype": TRAINED,
    "model_name": CODE,
    "base_model": CODE,
    "max_sequence_length": "the context is max_position_embeddings",
    "max_seq_len": "the context is max_position_embeddings",
    "seq_length": "the context is max_position_embeddings",
    "model_max_length": "the context is max_position_embeddings",
    "is_llama_config": CODE,
    "transformers.js_config": "of another runtime",
    "license": CODE,
    "pre_weights_version": CODE,
}

FIXED: dict[str, tuple[object, ...]] = {
    **CONSTRAINTS,
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, []),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "per_layer_config": ({}, []),
    "quantization": ({},),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
}


# The sizes that most text models state. A family names other defaults behind them.
USUAL_SIZES: dict[str, object] = {
    "hidden_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": REQUIRED,
    "vocab_size": REQUIRED,
    "max_position_embeddings": REQUIRED,
}


def text_keys(
    defaults: dict[str, object],
    fixed: dict[str, tuple[object, ...]] | None = None,
    harmless: dict[str, str] | None = None,
    aliases: dict[str, str] | None = None,
) -> ConfigKeys:
    """The keys of a text model's config: its own, and those that every config may have."""
    return ConfigKeys(
        defaults=defaults,
        fixed={key: values for key, values in FIXED.items() if key not in defaults} | (fixed or {}),
        harmless={key: why for key, why in HARMLESS.items() if key not in defaults}
        | (harmless or {}),
        elsewhere=ELSEWHERE,
        aliases=aliases or {},
    )
