"""StableLM 2 (the base of MoE-TinyMed): LayerNorm with biases, SwiGLU, rotary positions on a
quarter of each head, biases on q, k and v.

Old configs (model_type stablelm_epoch) call the same numbers rope_pct and norm_eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.family_helpers import (
    LAYER_NORM_GGUF_KEYS,
    require,
    usual_decoder,
    usual_parts,
)


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    require(config, {"hidden_act": "silu", "qk_layernorm": False, "use_parallel_residual": False})
    return usual_decoder(
        config,
        shapes,
        norm_eps=config.get("layer_norm_eps", config.get("norm_eps", 1e-5)),
        activation="silu",
        gated=True,
    )


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    # Version 1 has no biases on q, k and v: parts may be without theirs.
    return usual_parts(d, {"norm": True, "qkv": True, "o": False, "mlp": False, "lm_head": False})


FAMILY = Architecture(
    name="stablelm",
    model_types=("stablelm", "stablelm_epoch"),
    decoder=decoder,
    parts=parts,
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=dict,
    gguf_arch="stablelm",
    gguf_keys=LAYER_NORM_GGUF_KEYS,
    reference_name="stablelm-2-1.6b",
    # stabilityai/stablelm-2-1_6b config.json
    reference_config={
        "model_type": "stablelm",
        "architectures": ["StableLmForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 5632,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": True,
        "use_parallel_residual": False,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    auto_classes={"lm": "AutoModelForCausalLM", "classes": "AutoModelForSequenceClassification"},
)
