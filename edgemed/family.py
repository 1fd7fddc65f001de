"""The values that describe one architecture: numbers of the decoder, and where each part lies in a checkpoint.

A family is a frozen value in one file under families/, not a class tree: steps and targets read these values and never
ask which family they have, so a new architecture is one new file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgemed import plugins
from edgemed.errors import EdgemedError, nearest


@dataclass(frozen=True)
class Decoder:
    """Numbers of one decoder-only transformer; all sizes in elements.

    score_scale: factor on q.k per layer. positions: 'learned' (absolute table). activation: 'gelu_tanh'.
    head: 'lm' (next token), 'choice' (one score per sequence) or 'classes' (head_size scores per sequence),
    the last two read from the last token.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    score_scale: tuple[float, ...]
    norm: str = "layernorm"
    positions: str = "learned"
    activation: str = "gelu_tanh"
    tied: bool = True
    head: str = "lm"
    head_size: int = 0
    eos: int | None = None

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def fold_factor(self, layer: int) -> float:
        """What q must be multiplied with so that the plain 1/sqrt(head_dim) scale gives this layer's scores."""
        return self.score_scale[layer] * self.head_dim**0.5


@dataclass(frozen=True)
class Part:
    """One canonical part of a decoder and the checkpoint modules it is made of (joined along the output axis).

    kind: 'matrix' (weight [out, in], perhaps bias, may be quantized), 'table' (weight [rows, width]) or 'norm' (weight, bias [width]).
    conv1d: stored as [in, out], as GPT-2 does. bias: whether a bias is stored.
    """

    modules: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    conv1d: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Family:
    """What is peculiar to one architecture.

    decoder(config, tensor_shapes) -> Decoder. parts(decoder) -> canonical name -> Part, canonical names being 'embed', 'positions',
    'layers.N.{attn_norm,qkv,o,mlp_norm,up,down}', 'final_norm', and 'lm_head' or 'head'.
    prefixes: key prefixes under which the modules may be stored. ignored: endings of stored buffers that carry no information.
    folded(config): the config after score_scale has been folded into the q rows. gguf_arch, gguf_pre: llama.cpp's names for
    the graph and the pre-tokenizer. reference_config: published true dimensions, for --random-weights.
    auto_classes: head -> transformers Auto class, for peft.
    """

    name: str
    model_types: tuple[str, ...]
    decoder: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Decoder]
    parts: Callable[[Decoder], dict[str, Part]]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...]
    folded: Callable[[Mapping[str, Any]], dict[str, Any]]
    gguf_arch: str
    gguf_pre: str
    reference_name: str
    reference_config: Mapping[str, Any]
    auto_classes: Mapping[str, str]


def whole(config: Mapping[str, Any], key: str) -> int:
    """A size in config.json. Raises EdgemedError where it is missing or not a whole number above 0."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        said = f"has {key} {value!r}, which is not a whole number above 0" if key in config else f"has no {key}"
        raise EdgemedError(f"config.json {said}", "Download it again")
    return value


def all_families() -> dict[str, Family]:
    return {name: plugins.load("families", name).FAMILY for name in plugins.names("families")}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises EdgemedError listing the known architectures and the nearest."""
    model_type = str(config.get("model_type", ""))
    families = all_families()
    for family in families.values():
        if model_type in family.model_types:
            return family
    known = [t for family in families.values() for t in family.model_types]
    raise EdgemedError(f"{where}: unknown architecture '{model_type or '(no model_type)'}'", nearest(model_type, known))
