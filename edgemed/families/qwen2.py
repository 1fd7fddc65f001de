"""Qwen2 (the text model of HuatuoGPT-Vision and of Qwen2-VL): as Llama, with biases on q, k and v
and, in the small sizes, tied embeddings.

Its sliding window is never switched on in the published models. A config that switches one on that
is shorter than the context is refused.
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
    check_full_attention,
    usual_decoder,
    usual_parts,
)
from edgemed.models.rope import ROPE_DEFAULTS, unscaled_rope

# transformers' Qwen2Config
KEYS = text_keys(
    {
        **ROPE_DEFAULTS,
        **USUAL_SIZES,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "eos_token_id": None,
    },
    fixed={"partial_rotary_factor": (1.0,)},
)


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
    check_full_attention(reader, d.layers, d.context)
    return d


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    return usual_parts(d, {"norm": False, "qkv": True, "o": False, "mlp": False, "lm_head": False})


FAMILY = Architecture(
    name="qwen2",
    model_types=("qwen2",),
    decoder=decoder,
    parts=parts,
    biases={"qkv": True},
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=unscaled_rope,
    config_keys={"Qwen2Config": KEYS},
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
