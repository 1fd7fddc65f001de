"""Phi-1.5 and Phi-2 (a base of Med-MoE): one norm feeds attention and MLP in parallel, partial
rotary positions, biases everywhere.

The output matrix has a bias too, which other decoders do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.config_keys import USUAL_SIZES, text_keys
from edgemed.models.config_reader import HEADS, ConfigReader
from edgemed.models.family_helpers import (
    GELU,
    LAYER_NORM_GGUF_KEYS,
    usual_decoder,
    usual_parts,
)
from edgemed.models.rope import ROPE_DEFAULTS, unscaled_rope

# What PhiConfig takes where a config does not say it; not a field of the class.
ROTATED_SHARE = 0.5
# transformers' PhiConfig
KEYS = text_keys(
    {
        **ROPE_DEFAULTS,
        **USUAL_SIZES,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": None,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    fixed={"qk_layernorm": (False,)},
)


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    reader = ConfigReader(config, KEYS)
    return usual_decoder(
        reader,
        shapes,
        norm_eps=reader.number("layer_norm_eps", most=1.0),
        head_dim=reader.optional_size("head_dim", HEADS),
        rotated_share=ROTATED_SHARE,
        activation=reader.choice("hidden_act", GELU),
        parallel=True,
    )


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    bias = dict.fromkeys(("norm", "qkv", "o", "mlp", "lm_head"), True)
    return usual_parts(
        d, bias, o="self_attn.dense", up=("mlp.fc1",), down="mlp.fc2", final_norm="final_layernorm"
    )


FAMILY = Architecture(
    name="phi",
    model_types=("phi",),
    decoder=decoder,
    parts=parts,
    biases=dict.fromkeys(("qkv", "o", "up", "down"), True),
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=unscaled_rope,
    config_keys={"PhiConfig": KEYS},
    gguf_arch="phi2",
    gguf_keys=LAYER_NORM_GGUF_KEYS,
    reference_name="phi-2",
    # microsoft/phi-2 config.json
    reference_config={
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 10240,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    auto_classes={"lm": "AutoModelForCausalLM", "classes": "AutoModelForSequenceClassification"},
)
