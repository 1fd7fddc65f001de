"""Llama 2 and 3 (FineMedLM-o1, LLaVA-Med's text model): RMSNorm, rotary positions, grouped queries,
SwiGLU, no biases as published.

llama.cpp's graph of this name rotates neighbouring elements of a head, so its rows of q and k are
interleaved when they are written there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.config_keys import USUAL_SIZES, text_keys
from edgemed.models.config_reader import HEADS, ConfigReader
from edgemed.models.family_helpers import (
    RMS_GGUF_KEYS,
    SILU,
    usual_decoder,
    usual_parts,
)
from edgemed.models.rope import ROPE_DEFAULTS, unscaled_rope

# transformers' LlamaConfig
KEYS = text_keys(
    {
        **ROPE_DEFAULTS,
        **USUAL_SIZES,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    },
    fixed={"partial_rotary_factor": (1.0,)},
)

BIASES = {"qkv": "attention_bias", "o": "attention_bias", "up": "mlp_bias", "down": "mlp_bias"}


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    reader = ConfigReader(config, KEYS)
    d = usual_decoder(
        reader,
        shapes,
        norm_eps=reader.number("rms_norm_eps", most=1.0),
        head_dim=reader.optional_size("head_dim", HEADS),
        norm="rmsnorm",
        activation=reader.choice("hidden_act", SILU),
        gated=True,
    )
    for key in set(BIASES.values()):
        reader.flag(key)
    return d


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    # Biases, where a fine-tune's config asks for some, are read with the matrices; the published
    # models have none.
    return usual_parts(d, {"norm": False, "qkv": False, "o": False, "mlp": False, "lm_head": False})


FAMILY = Architecture(
    name="llama",
    model_types=("llama",),
    decoder=decoder,
    parts=parts,
    biases=BIASES,
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=unscaled_rope,
    config_keys={"LlamaConfig": KEYS},
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
