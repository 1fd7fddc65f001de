"""What family files share: the usual numbers of a config, the usual parts of a decoder.

A family file states what is peculiar to it. What several families have in common is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig, ParamSpec
from edgemed.models.config_reader import HEADS, LAYERS, ConfigReader, short
from edgemed.models.rope import Rope, read_rope

SLIDING = "sliding_attention"
# What transformers' names of activations stand for. The tanh forms are one function.
SILU = {"silu": "silu", "swish": "silu"}
GELU = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
}

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


def head_of(shapes: Mapping[str, tuple[int, ...]], module: str = "score") -> dict[str, Any]:
    """The head fields of DecoderConfig from the stored tensors: with a classification head, or {}
    for a language model.
    """
    shape = shapes.get(f"{module}.weight")
    if not shape:
        return {}
    return {"head": "classes", "head_size": shape[0]}


def usual_decoder(
    config: ConfigReader,
    shapes: Mapping[str, tuple[int, ...]],
    norm_eps: float,
    head_dim: int | None = None,
    rotated_share: float = 1.0,
    **differences: Any,
) -> DecoderConfig:
    """The numbers of a decoder whose config.json uses transformers' usual keys.

    head_dim: where the config has one of its own. rotated_share: see `read_rope`. differences:
    fields in which this family differs (norm, activation, gated, parallel and so on), which win.
    Raises EdgemedError for a number that is missing, malformed or does not go with the others.
    """
    hidden = config.size("hidden_size", 1 << 20)
    layers = config.size("num_hidden_layers", LAYERS)
    heads = config.size("num_attention_heads", HEADS)
    kv_heads = config.optional_size("num_key_value_heads", HEADS) or heads
    head_dim = head_dim or head_size(config, hidden, heads)
    if heads % kv_heads:
        raise EdgemedError(
            f"{config.place}num_attention_heads {heads} is not a multiple of num_key_value_heads"
            f" {kv_heads}",
            "The config is damaged",
        )
    context = config.size("max_position_embeddings")
    rope, _ = read_rope(config, head_dim, context, rotated_share)
    vocab = config.size("vocab_size")
    stop_tokens = stop_tokens_of(config, vocab)
    fields: dict[str, Any] = {
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": vocab,
        "ffn": config.size("intermediate_size"),
        "norm_eps": norm_eps,
        "tied": config.flag("tie_word_embeddings"),
        "eos": stop_tokens[0] if stop_tokens else None,
        "stop_tokens": stop_tokens,
        **rotary(config, rope, head_dim, layers),
        **head_of(shapes),
    }
    return DecoderConfig(**fields | differences)


def stop_tokens_of(config: ConfigReader, vocab: int) -> tuple[int, ...]:
    """Every id that ends a text. transformers' default, of the model its class was written for, is
    left out where this vocabulary does not have it.
    """
    config.check_tokens("bos_token_id")
    stop_tokens = config.tokens("eos_token_id")
    if "eos_token_id" not in config.values and any(token >= vocab for token in stop_tokens):
        return ()
    return stop_tokens


def check_full_attention(config: ConfigReader, layers: int, context: int) -> None:
    """Raise EdgemedError where a layer attends within a window that is shorter than the context.

    Reads use_sliding_window, sliding_window, max_window_layers and layer_types as transformers'
    Qwen2Config does: layers from max_window_layers on have the window, unless layer_types says it.
    """
    is_used = bool(config.raw("use_sliding_window")) and config.flag("use_sliding_window")
    window = config.optional_size("sliding_window") if is_used else None
    first = config.size("max_window_layers", least=0)
    types = config.raw("layer_types")
    if types is None:
        types = ["full_attention"] * min(first, layers)
        types += [SLIDING if window else "full_attention"] * (layers - len(types))
    if not isinstance(types, list) or len(types) != layers:
        raise config.malformed("layer_types", f"a list of {layers} names")
    for n, kind in enumerate(types):
        if kind == "full_attention" or (kind == SLIDING and window and window >= context):
            continue
        raise EdgemedError(
            f"{config.place}layer {n} has {short(kind)} (layer_types, use_sliding_window"
            f" {config.raw('use_sliding_window')}, sliding_window {window}), which is not"
            " supported",
            "Known: full_attention, or a window as long as the context",
        )


def head_size(config: ConfigReader, hidden: int, heads: int) -> int:
    """Elements of a head where the config does not state them. Raises EdgemedError where the hidden
    size is not a multiple of the heads.
    """
    if hidden % heads:
        raise EdgemedError(
            f"{config.place}hidden size {hidden} is not a multiple of the {heads} heads",
            "The config is damaged",
        )
    return hidden // heads


def rotary(config: ConfigReader, rope: Rope, head_dim: int, layers: int) -> dict[str, Any]:
    """The fields of DecoderConfig that positions decide.

    A factor on cosines and sines of q and of k is its square on the scores, where whole heads are
    rotated. Raises EdgemedError where only a part of each head is.
    """
    factor = rope.attention_factor
    scale: float = head_dim**-0.5
    if factor != 1.0:
        if 2 * len(rope.frequencies) != head_dim:
            raise EdgemedError(
                f"{config.place}an attention factor of {factor:.4g} on a part of each head is not"
                " supported",
                "Known: rotary positions over whole heads",
            )
        scale *= factor * factor
    return {
        "positions": "rope",
        "rope_theta": rope.theta,
        "rope_frequencies": rope.frequencies,
        "context": rope.context,
        "score_scale": (scale,) * layers,
    }


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
