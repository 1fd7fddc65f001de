"""The values that describe one architecture: numbers of the decoder, and where each part lies in a
checkpoint.

A family is a frozen value in one file under families/, not a class tree: steps and targets read
these values and never ask which family they have, so a new architecture is one new file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemed import plugins
from edgemed.errors import EdgemedError, nearest


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of some layers' MLPs. count: experts of one layer; active: how
    many of them a token uses; layers: which have them.

    The router's scores become gates by softmax over all experts, in float32. A token goes to the
    `active` experts of the largest gates, and their outputs are added, each times its gate;
    renormalised: the chosen gates are divided by their sum first. shared: one more expert, which
    every token uses with gate 1. router_bias: the router adds one.

    rank or density above 0: the experts of a layer share one matrix ('base.up', 'base.down'), and
    each adds its own difference: of that rank (b a), or with that share of each row's weights
    (values at columns).
    """

    count: int
    active: int
    layers: tuple[int, ...]
    renormalised: bool
    shared: bool = False
    router_bias: bool = False
    rank: int = 0
    density: float = 0.0

    @property
    def based(self) -> bool:
        """Whether they are stored as one shared matrix and differences."""
        return bool(self.rank or self.density)

    def kept(self, columns: int) -> int:
        """Weights of each row of `columns` that a sparse difference holds."""
        return max(1, round(self.density * columns))


@dataclass(frozen=True)
class DecoderConfig:
    """Numbers of one decoder-only transformer; all sizes in elements.

    score_scale: factor on q.k per layer. norm: 'layernorm' or 'rmsnorm'. positions: 'learned'
    (absolute table) or 'rope': the first 2 * len(rope_frequencies) elements of each head are
    rotated, element i with element i + len(rope_frequencies), by position * rope_frequencies[i]
    radians (rope_theta is the base they come from); rope_axes[i]: which part of a position with
    several parts pair i counts (all 0: positions are plain numbers). activation: 'gelu_tanh',
    'gelu' or 'silu'. gated: the MLP is down(activation(gate x) * (up x)). parallel: attention and
    MLP both read the attention norm of the same x. head: 'lm' (next token), 'choice' (one score per
    sequence) or 'classes' (head_size scores per sequence), the last two read from the last token.
    experts: where some MLPs are mixtures of experts, each of size ffn.
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
    rope_frequencies: tuple[float, ...] = ()
    rope_theta: float = 0.0
    rope_axes: tuple[int, ...] = ()
    activation: str = "gelu_tanh"
    gated: bool = False
    parallel: bool = False
    tied: bool = True
    head: str = "lm"
    head_size: int = 0
    eos: int | None = None
    experts: ExpertsConfig | None = None

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def cache_elements(self, context: int) -> int:
        """Numbers in a KV cache of `context` tokens."""
        return 2 * self.layers * self.kv_size * context

    def sparse(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers

    def mlps(self, layer: int) -> tuple[str, ...]:
        """What stands before 'up' and 'down' in the names of this layer's MLPs: '' alone, or
        'experts.J.' of each expert (of those with a shared matrix 'base.') and 'shared.'.
        """
        if not self.sparse(layer):
            return ("",)
        own = (
            ("base.",)
            if self.experts.based
            else tuple(f"experts.{j}." for j in range(self.experts.count))
        )
        return (*own, *(("shared.",) if self.experts.shared else ()))

    def matrices(self, layer: int) -> tuple[str, ...]:
        """The matrices of one layer that may be quantized, in the order they are computed; parts
        are called 'layers.N.' and then these.
        """
        return (
            "qkv",
            "o",
            *(f"{mlp}{part}" for mlp in self.mlps(layer) for part in ("up", "down")),
        )

    def fold_factor(self, layer: int) -> float:
        """What q must be multiplied with so that the plain 1/sqrt(head_dim) scale gives this
        layer's scores.
        """
        return self.score_scale[layer] * self.head_dim**0.5


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of a vision tower and of the projector behind it; sizes in elements.

    layers: those that are computed; spare: stored behind them and never read. patch: pixels per
    side of a patch; temporal: how often an image is stacked in one (a still image as frames of a
    film); merge: patches per side that become one feature. pixels: (least, most) of an image, which
    is resized to multiples of patch * merge within them; size: or the one side every image gets,
    and fit how: 'pad' (to a square of the mean colour, then resized), 'crop' (shortest side
    resized, the middle cut out) or 'stretch'. frequencies: rotary over row (first half of the
    pairs) and column (second half); empty: a learned table and, in front, a class token that is
    dropped again. pre_norm: a norm before the first layer. projector_hidden: middle of the
    two-layer projector; projector_norm: a norm in front of it. token: id that stands for one
    feature in a prompt, between `before` and `after`; it may lie outside the vocabulary, for it is
    never looked up. marker: the text that becomes this id where the tokenizer has no token for it;
    start: ids in front of every prompt. conversation: which of its family's conversation forms the
    model was trained on. mean, std: of RGB in 0..1. activation: 'quick_gelu' or 'gelu'.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    norm_eps: float
    activation: str
    patch: int
    projector_hidden: int
    token: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temporal: int = 1
    merge: int = 1
    pixels: tuple[int, int] = (0, 0)
    size: int = 0
    fit: str = "pad"
    frequencies: tuple[float, ...] = ()
    pre_norm: bool = False
    projector_norm: bool = False
    spare: int = 0
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    marker: str = ""
    start: tuple[int, ...] = ()
    conversation: str = ""

    @property
    def patch_size(self) -> int:
        """Numbers of one patch: 3 colours, `temporal` frames, patch * patch pixels."""
        return 3 * self.temporal * self.patch**2


@dataclass(frozen=True)
class ParamSpec:
    """One canonical part of a decoder and the checkpoint modules it is made of (joined along the
    output axis).

    kind: 'matrix' (weight [out, in], perhaps bias, may be quantized), 'router' (a matrix that stays
    float32: its rows decide which experts a token uses), 'table' (weight [rows, width]), 'norm'
    (weight [width], perhaps bias), 'delta' (what an expert adds to a shared matrix) or 'index'
    (int32, where it adds it). conv1d: stored as [in, out], as GPT-2 does. bias: whether a bias is
    stored. rows: output rows of each module, where there are several. stored_shape: where a weight
    is stored with other axes than `shape` has (a convolution over patches). bare: stored under the
    module's own name, without '.weight'.
    """

    modules: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    conv1d: bool = False
    bias: bool = False
    rows: tuple[int, ...] = ()
    stored_shape: tuple[int, ...] = ()
    bare: bool = False

    def weight(self, module: str) -> str:
        """The name of a module's weight tensor."""
        return module if self.bare else f"{module}.weight"

    def stored(self) -> list[tuple[str, tuple[int, ...]]]:
        """(module, shape of its weight as stored) of each module."""
        shapes = (
            [self.stored_shape]
            if self.stored_shape
            else [(rows, *self.shape[1:]) for rows in self.rows or self.shape[:1]]
        )
        return [
            (module.split("|")[0], shape[::-1] if self.conv1d else shape)
            for module, shape in zip(self.modules, shapes, strict=True)
        ]


@dataclass(frozen=True)
class Architecture:
    """What is peculiar to one architecture.

    decoder(config, tensor_shapes) -> Decoder. parts(decoder) -> canonical name -> Part, canonical
    names being 'embed', 'positions',
    'layers.N.{attn_norm,qkv,o,mlp_norm,up,down}', 'final_norm', and 'lm_head' or 'head'. qkv holds
    the rows of q, k and v; up holds, where
    the MLP is gated, the rows of gate and then of up; a parallel block has no mlp_norm. A layer
    with experts has router, experts.J.up and experts.J.down, and
    perhaps shared.up and shared.down in place of up and down; where experts share a matrix,
    base.up, base.down and experts.J.{up,down}.{a,b} or .{values,columns}, and .bias.
    prefixes: key prefixes under which the modules may be stored. ignored: endings of stored buffers
    that carry no information.
    folded(config): the config after score_scale has been folded into the q rows. gguf_arch,
    gguf_pre: llama.cpp's names for
    the graph ('': it has none) and the pre-tokenizer. reference_config: published true dimensions,
    for --random-weights; other_references: name -> those of its other models.
    gguf_projector: llama.cpp's name for its graph of the vision tower and projector, '' where it
    has none that is right.
    auto_classes: head -> transformers Auto class, for peft. gguf_interleaved: that graph rotates
    elements 2i and 2i+1 of a head, not i and i+half.
    gguf_centred: that graph has RMS norms where the model has layer norms, which are the same where
    the residual stream has no mean: it is taken out of
    everything that is added to it.
    vision(config, preprocessor_config, tensor_shapes) -> Vision and vision_parts(vision, decoder)
    -> canonical name -> Part ('vision.patch',
    'vision.layers.N.*', 'vision.projector.*'; 'vision.spare.*' is stored and never read), of
    families that see.
    variant(config) -> the family as one config has it, where its text model may be one of several
    other families'.
    text_config(config) -> the config under which transformers reads the text model alone, None
    where it reads the whole checkpoint.
    chat(text, images, conversation) -> prompt: one user turn in the model's own form
    (Vision.conversation), with one image token where each image stands. reasoning(question)
    -> that question with the instructions a reasoning fine-tune was trained with; answer(text) ->
      the letter its answer names, None where it names none.
    opening: what such an answer writes right before that letter. without_experts(config, times) ->
    the config of the dense model with MLPs `times` as wide;
    shared_experts(config, rank, density) -> that of the model whose experts share a matrix (see
    Experts).
    """

    name: str
    model_types: tuple[str, ...]
    decoder: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], DecoderConfig]
    parts: Callable[[DecoderConfig], dict[str, ParamSpec]]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...]
    folded: Callable[[Mapping[str, Any]], dict[str, Any]]
    gguf_arch: str
    gguf_pre: str
    reference_name: str
    reference_config: Mapping[str, Any]
    auto_classes: Mapping[str, str]
    gguf_interleaved: bool = False
    gguf_centred: bool = False
    gguf_projector: str = ""
    vision: (
        Callable[
            [Mapping[str, Any], Mapping[str, Any], Mapping[str, tuple[int, ...]]], VisionConfig
        ]
        | None
    ) = None
    vision_parts: Callable[[VisionConfig, DecoderConfig], dict[str, ParamSpec]] | None = None
    variant: Callable[[Mapping[str, Any]], Architecture] | None = None
    text_config: Callable[[Mapping[str, Any]], dict[str, Any] | None] | None = None
    chat: Callable[[str, int, str], str] | None = None
    reasoning: Callable[[str], str] | None = None
    answer: Callable[[str], str | None] | None = None
    opening: str = ""
    without_experts: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None
    shared_experts: Callable[[Mapping[str, Any], int, float], dict[str, Any]] | None = None
    other_references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def every_part(
    family: Architecture, d: DecoderConfig, vision: VisionConfig | None
) -> dict[str, ParamSpec]:
    """All canonical parts of a checkpoint: the text decoder's, and the vision tower's where there
    is one.
    """
    return family.parts(d) | (family.vision_parts(vision, d) if vision else {})


def all_families() -> dict[str, Architecture]:
    return {name: plugins.load("families", name).FAMILY for name in plugins.names("families")}


def family_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The family of a config.json. Raises EdgemedError listing the known architectures and the
    nearest.
    """
    model_type = str(config.get("model_type", ""))
    families = all_families()
    for family in families.values():
        if model_type in family.model_types:
            return family.variant(config) if family.variant else family
    known = [t for family in families.values() for t in family.model_types]
    raise EdgemedError(
        f"{where}: unknown architecture '{model_type or '(no model_type)'}'",
        nearest(model_type, known),
    )
