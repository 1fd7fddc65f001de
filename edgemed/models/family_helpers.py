"""What family files share: reading numbers from a config, the usual parts of a decoder, rotary
angles.

A family file states what is peculiar to it; what is not peculiar is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig, ParamSpec


def relocated(
    parts: Mapping[str, ParamSpec], places: Mapping[str, tuple[str, ...]]
) -> dict[str, ParamSpec]:
    """A text model's parts inside a larger checkpoint. places: beginning of a module's name there
    -> what may stand in its stead, first match.
    """

    def at(module: str) -> str:
        start = next((start for start in places if module.startswith(start)), None)
        return (
            module
            if start is None
            else "|".join(place + module.removeprefix(start) for place in places[start])
        )

    return {
        name: replace(part, modules=tuple(at(module) for module in part.modules))
        for name, part in parts.items()
    }


def whole(config: Mapping[str, Any], key: str) -> int:
    """A size in config.json. Raises EdgemedError where it is missing or not a whole number above
    0.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        said = (
            f"has {key} {value!r}, which is not a whole number above 0"
            if key in config
            else f"has no {key}"
        )
        raise EdgemedError(f"config.json {said}", "Download it again")
    return value


def rotary(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Decoder's rope fields from a config in transformers' layout, old (rope_theta, rope_scaling,
    partial_rotary_factor or rope_pct) or new (rope_parameters).
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}

    def known(*names: str, default: float) -> float:
        return float(
            next(
                (
                    place[name]
                    for name in names
                    for place in (scaling, config)
                    if place.get(name) is not None
                ),
                default,
            )
        )

    theta = known("rope_theta", default=10000.0)
    width = int(head_dim * known("partial_rotary_factor", "rope_pct", default=1.0))
    return {
        "positions": "rope",
        "rope_theta": theta,
        "rope_frequencies": inverse_frequencies(width, theta, scaling),
    }


def first_token(value: Any) -> int | None:
    """An end-of-text id; recent configs may list several, of which the first is the base
    model's.
    """
    return value[0] if isinstance(value, list) else value


def head_of(shapes: Mapping[str, tuple[int, ...]], module: str = "score") -> dict[str, Any]:
    """Decoder's head fields from the stored tensors: a classification head is there, or the model
    is a language model.
    """
    shape = shapes.get(f"{module}.weight")
    return {"head": "classes", "head_size": shape[0]} if shape else {}


def checked(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise EdgemedError where a config asks for something this family's graph does not have.
    wanted: key -> the one supported value.
    """
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise EdgemedError(
                f"config.json: {key} {config[key]!r} is not supported", f"Known: {value!r}"
            )


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

    found = {"embed": ParamSpec((at("embed_tokens"),), "table", (d.vocab, d.hidden))}
    heads = d.q_size
    kv = d.kv_size
    for n in range(d.layers):
        layer = f"layers.{n}."
        qkv = tuple(at(f"{layer}self_attn.{part}_proj") for part in "qkv")
        found[f"layers.{n}.attn_norm"] = ParamSpec(
            (at(f"{layer}input_layernorm"),),
            "norm",
            (d.hidden,),
            bias=bias["norm"],
        )
        found[f"layers.{n}.qkv"] = ParamSpec(
            qkv,
            "matrix",
            (heads + 2 * kv, d.hidden),
            bias=bias["qkv"],
            rows=(heads, kv, kv),
        )
        found[f"layers.{n}.o"] = ParamSpec(
            (at(layer + o),),
            "matrix",
            (d.hidden, heads),
            bias=bias["o"],
        )
        if not d.parallel:
            found[f"layers.{n}.mlp_norm"] = ParamSpec(
                (at(f"{layer}post_attention_layernorm"),),
                "norm",
                (d.hidden,),
                bias=bias["norm"],
            )
        modules = tuple(at(layer + part) for part in up)
        found[f"layers.{n}.up"] = ParamSpec(
            modules,
            "matrix",
            (len(up) * d.ffn, d.hidden),
            bias=bias["mlp"],
            rows=(d.ffn,) * len(up),
        )
        found[f"layers.{n}.down"] = ParamSpec(
            (at(layer + down),),
            "matrix",
            (d.hidden, d.ffn),
            bias=bias["mlp"],
        )
    found["final_norm"] = ParamSpec(
        (at(final_norm),),
        "norm",
        (d.hidden,),
        bias=bias["norm"],
    )
    if d.head == "lm":
        found["lm_head"] = ParamSpec(
            (at("embed_tokens"),) if d.tied else ("lm_head",),
            "matrix",
            (d.vocab, d.hidden),
            bias=bias["lm_head"] and not d.tied,
        )
    else:
        found["head"] = ParamSpec(("score",), "matrix", (d.head_size, d.hidden))
    return found


def inverse_frequencies(
    width: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[float, ...]:
    """Rotary frequencies theta^(-2i/width), i < width/2 (Su et al. 2021), rescaled as transformers'
    rope types 'default', 'linear' and 'llama3' do.

    Raises EdgemedError for another rope type.
    """
    found = [theta ** (-2 * i / width) for i in range(width // 2)]
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return tuple(found)
    if kind == "linear":
        return tuple(f / scaling["factor"] for f in found)
    if kind != "llama3":
        raise EdgemedError(
            f"config.json: rope type '{kind}' is not supported", "Known: default, linear, llama3"
        )
    # Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed.
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    mixed = []
    for f in found:
        share = min(max((old * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        mixed.append((1 - share) * f / scaling["factor"] + share * f)
    return tuple(mixed)
