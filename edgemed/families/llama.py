"""Llama 2 and 3 (FineMedLM-o1, LLaVA-Med's text model): RMSNorm, rotary positions, grouped queries,
SwiGLU, no biases as published.

llama.cpp's graph of this name rotates neighbouring elements of a head, so its rows of q and k are
interleaved when they are written there.
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
    require(config, {"hidden_act": "silu"})
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
    # Biases, where a fine-tune's config asks for some, are found in the tensors and read; the
    # published models have none.
    return usual_parts(d, {"norm": False, "qkv": False, "o": False, "mlp": False, "lm_head": False})


FAMILY = Architecture(
    name="llama",
    model_types=("llama",),
    decoder=decoder,
    parts=parts,
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=dict,
    gguf_arch="llama",
    gguf_interleaved=True,
    gguf_keys=RMS_GGUF_KEYS,
    reference_name="llama-3.1-8b",
    # meta-llama/Llama-3.1-8B config.json
    reference_config={
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    auto_classes={"lm": "AutoModelForCausalLM", "classes": "AutoModelForSequenceClassification"},
)
