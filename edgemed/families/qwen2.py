"""Qwen2 (the text model of HuatuoGPT-Vision and of Qwen2-VL): as Llama, with biases on q, k and v
and, in the small sizes, tied embeddings.

Its sliding window is never switched on in the published models, and a config that switches it on is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.family_helpers import (
    RMS_GGUF_KEYS,
    require,
    usual_decoder,
    usual_parts,
)


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    require(config, {"hidden_act": "silu", "use_sliding_window": False})
    return usual_decoder(
        config,
        shapes,
        head_dim=config.get("head_dim"),
        norm="rmsnorm",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation="silu",
        gated=True,
    )


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    return usual_parts(d, {"norm": False, "qkv": True, "o": False, "mlp": False, "lm_head": False})


FAMILY = Architecture(
    name="qwen2",
    model_types=("qwen2",),
    decoder=decoder,
    parts=parts,
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=dict,
    gguf_arch="qwen2",
    gguf_keys=RMS_GGUF_KEYS,
    gguf_any_head="llama",
    reference_name="qwen2-1.5b",
    # Qwen/Qwen2-1.5B config.json
    reference_config={
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    auto_classes={"lm": "AutoModelForCausalLM", "classes": "AutoModelForSequenceClassification"},
)
