"""StableLM 2 (the base of MoE-TinyMed): LayerNorm with biases, SwiGLU, rotary positions on a
quarter of each head, biases on q, k and v.

Old configs (model_type stablelm_epoch) call the same numbers rope_pct and norm_eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.config_keys import USUAL_SIZES, text_keys
from edgemed.models.config_reader import HEADS, ConfigReader
from edgemed.models.family_helpers import (
    LAYER_NORM_GGUF_KEYS,
    SILU,
    usual_decoder,
    usual_parts,
)
from edgemed.models.rope import ROPE_DEFAULTS, unscaled_rope

# What StableLmConfig takes where a config does not say it; not a field of the class.
ROTATED_SHARE = 0.25
# transformers' StableLmConfig; the aliases are those of the authors' own class before it.
KEYS = text_keys(
    {
        **ROPE_DEFAULTS,
        **USUAL_SIZES,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": None,
        "use_qkv_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    },
    fixed={
        "qk_layernorm": (False,),
        "use_parallel_residual": (False,),
        "rotary_scaling_factor": (1.0,),
    },
    harmless={"num_heads": "num_attention_heads is read"},
    aliases={"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},
)


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    reader = ConfigReader(config, KEYS)
    d = usual_decoder(
        reader,
        shapes,
        norm_eps=reader.number("layer_norm_eps", most=1.0),
        rotated_share=ROTATED_SHARE,
        activation=reader.choice("hidden_act", SILU),
        gated=True,
    )
    # transformers' class knows no head size of its own, but rotates by one that a config has.
    if reader.optional_size("head_dim", HEADS) not in (None, d.head_dim):
        raise reader.unsupported("head_dim", reader.raw("head_dim"), (d.head_dim,))
    reader.flag("use_qkv_bias")
    return d


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    # Version 1 has no biases on q, k and v: parts may be without theirs.
    return usual_parts(d, {"norm": True, "qkv": True, "o": False, "mlp": False, "lm_head": False})


FAMILY = Architecture(
    name="stablelm",
    model_types=("stablelm", "stablelm_epoch"),
    decoder=decoder,
    parts=parts,
    biases={"qkv": "use_qkv_bias"},
    prefixes=("",),
    ignored=(".rotary_emb.inv_freq",),
    folded=unscaled_rope,
    config_keys={"StableLmConfig": KEYS},
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
