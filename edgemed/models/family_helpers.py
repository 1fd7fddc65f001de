"""What family files share: reading numbers from a config, the usual parts of a decoder, rotary
angles.

A family file states what is peculiar to it. What several families have in common is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig, ParamSpec

# Keys of a GGUF file and of a config in transformers' usual layout that say the same.
USUAL_GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
}
RMS_GGUF_KEYS = {
    **USUAL_GGUF_KEYS,
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
LAYER_NORM_GGUF_KEYS = {
    **USUAL_GGUF_KEYS,
    "attention.layer_norm_epsilon": "layer_norm_eps",
}


def relocated(
    parts: Mapping[str, ParamSpec], places: Mapping[str, tuple[str, ...]]
) -> dict[str, ParamSpec]:
    """A text model's parts inside a larger checkpoint.

    places: beginning of a module's name in the text model -> its beginnings in the larger one. The
    first entry that matches counts.
    """

    def at(module: str) -> str:
        for start, alternatives in places.items():
            if module.startswith(start):
                return "|".join(place + module.removeprefix(start) for place in alternatives)
        return module

    return {
        name: replace(part, modules=tuple(at(module) for module in part.modules))
        for name, part in parts.items()
    }


def size_in(config: Mapping[str, Any], key: str) -> int:
    """A size in config.json. Raises EdgemedError where it is missing or not a whole number above
    0.
    """
    if key not in config:
        raise EdgemedError(f"config.json has no {key}", "Download it again")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EdgemedError(
            f"config.json has {key} {value!r}, which is not a whole number above 0",
            "Download it again",
        )
    return value


def rotary(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The rotary fields of DecoderConfig from a config in transformers' layout.

    Older configs have rope_theta, rope_scaling and partial_rotary_factor (or rope_pct), recent ones
    put them into rope_parameters.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = _first_number((scaling, config), ("rope_theta",), default=10000.0)
    share = _first_number((scaling, config), ("partial_rotary_factor", "rope_pct"), default=1.0)
    return {
        "positions": "rope",
        "rope_theta": theta,
        "rope_frequencies": inverse_frequencies(int(head_dim * share), theta, scaling),
    }


def _first_number(
    mappings: Sequence[Mapping[str, Any]], names: Sequence[str], default: float
) -> float:
    for name in names:
        for mapping in mappings:
            if mapping.get(name) is not None:
                return float(mapping[name])
    return default


def first_token(value: Any) -> int | None:
    """An end-of-text id; recent configs may list several, of which the first is the base
    model's.
    """
    return value[0] if isinstance(value, list) else value


def head_of(shapes: Mapping[str, tuple[int, ...]], module: str = "score") -> dict[str, Any]:
    """The head fields of DecoderConfig from the stored tensors: with a classification head, or {}
    for a language model.
    """
    shape = shapes.get(f"{module}.weight")
    if not shape:
        return {}
    return {"head": "classes", "head_size": shape[0]}


def require(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raise EdgemedError where a config asks for something this family's graph does not have.

    supported: key -> the one supported value, which is also what an absent key means.
    """
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise EdgemedError(
                f"config.json: {key} {config[key]!r} is not supported", f"Known: {value!r}"
            )


def usual_decoder(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    norm_eps: float,
    head_dim: int | None = None,
    **differences: Any,
) -> DecoderConfig:
    """A decoder whose config has transformers' usual keys: rotary positions, grouped queries, and a
    score scale of 1/sqrt(head_dim) in every layer.

    shapes: of the stored tensors, which tell the head. head_dim: None where a head is
    hidden_size / num_attention_heads. differences: fields of DecoderConfig in which a family
    differs from its defaults and from these. Raises EdgemedError for a missing or impossible size.
    """
    hidden = size_in(config, "hidden_size")
    layers = size_in(config, "num_hidden_layers")
    heads = size_in(config, "num_attention_heads")
    head_dim = head_dim or hidden // heads
    fields: dict[str, Any] = {
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "vocab": size_in(config, "vocab_size"),
        "ffn": size_in(config, "intermediate_size"),
        "context": size_in(config, "max_position_embeddings"),
        "norm_eps": norm_eps,
        "score_scale": (head_dim**-0.5,) * layers,
        "tied": config.get("tie_word_embeddings", False),
        "eos": first_token(config.get("eos_token_id")),
        **rotary(config, head_dim),
        **head_of(shapes),
    }
    return DecoderConfig(**fields | differences)


def usual_parts(
    d: DecoderConfig,
    bias: Mapping[str, bool],
    o: str = "self_attn.o_proj",
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"),
    down: str = "mlp.down_proj",
    final_norm: str = "norm",
    roots: tuple[str, ...] = ("model.",),
) -> dict[str, ParamSpec]:
    """The parts of a decoder stored in transformers' usual layout (model.layers.N.self_attn.q_proj
    and so on).

    bias: which of 'norm', 'qkv', 'o', 'mlp', 'lm_head' store one. roots: what may stand before the
    names of everything but the output matrix.
    """

    def at(module: str) -> str:
        return "|".join(root + module for root in roots)

    specs = {"embed": ParamSpec((at("embed_tokens"),), "table", (d.vocab, d.hidden))}
    heads = d.q_size
    kv = d.kv_size
    for n in range(d.layers):
        layer = f"layers.{n}."
        qkv = tuple(at(f"{layer}self_attn.{part}_proj") for part in "qkv")
        specs[f"layers.{n}.attn_norm"] = ParamSpec(
            (at(f"{layer}input_layernorm"),),
            "norm",
            (d.hidden,),
            bias=bias["norm"],
        )
        specs[f"layers.{n}.qkv"] = ParamSpec(
            qkv,
            "matrix",
            (heads + 2 * kv, d.hidden),
            bias=bias["qkv"],
            rows=(heads, kv, kv),
        )
        specs[f"layers.{n}.o"] = ParamSpec(
            (at(layer + o),),
            "matrix",
            (d.hidden, heads),
            bias=bias["o"],
        )
        if not d.parallel:
            specs[f"layers.{n}.mlp_norm"] = ParamSpec(
                (at(f"{layer}post_attention_layernorm"),),
                "norm",
                (d.hidden,),
                bias=bias["norm"],
            )
        modules = tuple(at(layer + part) for part in up)
        specs[f"layers.{n}.up"] = ParamSpec(
            modules,
            "matrix",
            (len(up) * d.ffn, d.hidden),
            bias=bias["mlp"],
            rows=(d.ffn,) * len(up),
        )
        specs[f"layers.{n}.down"] = ParamSpec(
            (at(layer + down),),
            "matrix",
            (d.hidden, d.ffn),
            bias=bias["mlp"],
        )
    specs["final_norm"] = ParamSpec(
        (at(final_norm),),
        "norm",
        (d.hidden,),
        bias=bias["norm"],
    )
    if d.head == "lm":
        specs["lm_head"] = ParamSpec(
            (at("embed_tokens"),) if d.tied else ("lm_head",),
            "matrix",
            (d.vocab, d.hidden),
            bias=bias["lm_head"] and not d.tied,
        )
    else:
        specs["head"] = ParamSpec(("score",), "matrix", (d.head_size, d.hidden))
    return specs


def inverse_frequencies(
    width: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[float, ...]:
    """Rotary frequencies theta^(-2i/width), i < width/2 (Su et al. 2021), rescaled as transformers'
    rope types 'default', 'linear' and 'llama3' do.

    Raises EdgemedError for another rope type.
    """
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return tuple(frequencies)
    if kind == "linear":
        return tuple(f / scaling["factor"] for f in frequencies)
    if kind != "llama3":
        raise EdgemedError(
            f"config.json: rope type '{kind}' is not supported", "Known: default, linear, llama3"
        )
    # Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed.
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    mixed = []
    for f in frequencies:
        # context * f / 2 pi: how often the wave turns within the context it was trained for. Below
        # `low` turns it is slowed, above `high` kept; the share is linear between them.
        share = min(max((context * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        mixed.append((1 - share) * f / scaling["factor"] + share * f)
    return tuple(mixed)
