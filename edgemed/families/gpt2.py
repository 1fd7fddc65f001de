"""GPT-2, and with it BioMedLM: learned positions, LayerNorm, fused QKV stored as [in, out], tied
embeddings.

BioMedLM sets scale_attn_by_inverse_layer_idx, which divides the scores of layer l by l+1; here it
is part of score_scale, so no target can forget it. Heads follow BioMedLM's published protocol (a
linear layer on the last token).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.config_keys import HEAD, SPEED, text_keys
from edgemed.models.config_reader import HEADS, LAYERS, REQUIRED, ConfigReader
from edgemed.models.family_helpers import GELU, head_size, stop_tokens_of

STORED_HEADS = ("classifier.weight", "score.weight", "multiple_choice_head.summary.weight")
# transformers' GPT2Config
KEYS = text_keys(
    {
        "n_embd": REQUIRED,
        "n_layer": REQUIRED,
        "n_head": REQUIRED,
        "n_inner": None,
        "vocab_size": REQUIRED,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "eos_token_id": 50256,
    },
    harmless={
        "reorder_and_upcast_attn": SPEED,
        "n_ctx": "the context is n_positions",
        **dict.fromkeys(
            ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
            HEAD,
        ),
    },
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
)


def decoder(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """Numbers from config.json; the head from the stored tensors, since BioMedLM's head classes are
    not transformers' own.
    """
    reader = ConfigReader(config, KEYS)
    hidden = reader.size("n_embd", 1 << 20)
    layers = reader.size("n_layer", LAYERS)
    heads = reader.size("n_head", HEADS)
    head_dim = head_size(reader, hidden, heads)
    scale = head_dim**-0.5 if reader.flag("scale_attn_weights") else 1.0
    by_layer = reader.flag("scale_attn_by_inverse_layer_idx")
    stored_head = next((name for name in STORED_HEADS if name in shapes), None)
    head = "lm"
    outputs = 0
    if stored_head is not None:
        outputs = shapes[stored_head][0]
        head = "choice" if outputs == 1 else "classes"
    vocab = reader.size("vocab_size")
    stop_tokens = stop_tokens_of(reader, vocab)
    return DecoderConfig(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        ffn=reader.optional_size("n_inner") or 4 * hidden,
        vocab=vocab,
        context=reader.size("n_positions"),
        norm_eps=reader.number("layer_norm_epsilon", most=1.0),
        score_scale=tuple(scale / (n + 1) if by_layer else scale for n in range(layers)),
        activation=reader.choice("activation_function", GELU),
        tied=reader.flag("tie_word_embeddings"),
        head=head,
        head_size=outputs,
        eos=stop_tokens[0] if stop_tokens else None,
        stop_tokens=stop_tokens,
    )


def parts(d: DecoderConfig) -> dict[str, ParamSpec]:
    specs = {
        "embed": ParamSpec(("wte",), "table", (d.vocab, d.hidden)),
        "positions": ParamSpec(("wpe",), "table", (d.context, d.hidden)),
    }
    for n in range(d.layers):
        specs |= {
            f"layers.{n}.attn_norm": ParamSpec(
                (f"h.{n}.ln_1",),
                "norm",
                (d.hidden,),
                bias=True,
            ),
            f"layers.{n}.qkv": ParamSpec(
                (f"h.{n}.attn.c_attn",),
                "matrix",
                (3 * d.hidden, d.hidden),
                conv1d=True,
                bias=True,
            ),
            f"layers.{n}.o": ParamSpec(
                (f"h.{n}.attn.c_proj",),
                "matrix",
                (d.hidden, d.hidden),
                conv1d=True,
                bias=True,
            ),
            f"layers.{n}.mlp_norm": ParamSpec(
                (f"h.{n}.ln_2",),
                "norm",
                (d.hidden,),
                bias=True,
            ),
            f"layers.{n}.up": ParamSpec(
                (f"h.{n}.mlp.c_fc",),
                "matrix",
                (d.ffn, d.hidden),
                conv1d=True,
                bias=True,
            ),
            f"layers.{n}.down": ParamSpec(
                (f"h.{n}.mlp.c_proj",),
                "matrix",
                (d.hidden, d.ffn),
                conv1d=True,
                bias=True,
            ),
        }
    specs["final_norm"] = ParamSpec(
        ("ln_f",),
        "norm",
        (d.hidden,),
        bias=True,
    )
    if d.head == "lm":
        specs["lm_head"] = ParamSpec(
            ("wte",) if d.tied else ("lm_head",), "matrix", (d.vocab, d.hidden)
        )
    else:
        specs["head"] = ParamSpec(
            ("classifier|score|multiple_choice_head.summary",), "matrix", (d.head_size, d.hidden)
        )
    return specs


def folded(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}


FAMILY = Architecture(
    name="gpt2",
    model_types=("gpt2",),
    decoder=decoder,
    parts=parts,
    prefixes=("transformer.", ""),
    ignored=(".attn.bias", ".attn.masked_bias"),
    folded=folded,
    config_keys={"GPT2Config": KEYS},
    gguf_arch="gpt2",
    gguf_keys={
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    reference_name="biomedlm",
    # stanford-crfm/BioMedLM config.json
    reference_config={
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 2560,
        "n_layer": 32,
        "n_head": 20,
        "n_positions": 1024,
        "n_inner": None,
        "vocab_size": 28896,
        "bos_token_id": 28895,
        "eos_token_id": 28895,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": True,
        "reorder_and_upcast_attn": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
    auto_classes={
        "lm": "AutoModelForCausalLM",
        "classes": "AutoModelForSequenceClassification",
        "choice": "AutoModelForSequenceClassification",
    },
)
