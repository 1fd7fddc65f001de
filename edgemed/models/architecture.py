"""The values that describe one architecture: numbers of the decoder, and where each part lies in a
checkpoint.

A family is a frozen value in one file under families/, not a class tree. Steps and targets read
these values and never ask which family they have, so a new architecture is one new file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemed import plugins
from edgemed.errors import EdgemedError, nearest
from edgemed.models.config_reader import ConfigKeys, short


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of some layers' MLPs.

    The router's scores become gates by softmax over all experts, in float32. A token goes to the
    `active` experts with the largest gates. Their outputs are added, each times its gate.
    """

    # experts of one layer
    count: int
    # how many of them a token uses
    active: int
    # which layers have them
    layers: tuple[int, ...]
    # The gates of the active experts are divided by their sum.
    renormalised: bool
    # There is one more expert, which every token uses with gate 1.
    shared: bool = False
    # The router adds a bias.
    router_bias: bool = False
    # Above 0 (one of the two): the experts of a layer share one matrix ('base.up', 'base.down') and
    # each adds a difference of its own. rank: the difference is a product b a of this rank;
    # density: it has this share of each row's weights, stored as values and their columns.
    rank: int = 0
    density: float = 0.0

    @property
    def has_shared_base(self) -> bool:
        """Whether the experts are stored as one shared matrix and differences."""
        return bool(self.rank or self.density)

    def kept_columns(self, columns: int) -> int:
        """Weights of each row of `columns` that a sparse difference holds."""
        return max(1, round(self.density * columns))


@dataclass(frozen=True)
class DecoderConfig:
    """Numbers of one decoder-only transformer; all sizes in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    # inner size of the MLP, and of each expert
    ffn: int
    vocab: int
    # largest number of tokens
    context: int
    norm_eps: float
    # per layer: factor on q.k
    score_scale: tuple[float, ...]
    # 'layernorm' or 'rmsnorm'
    norm: str = "layernorm"
    # 'learned' (a table of absolute positions) or 'rope'. With 'rope' the first
    # 2 * len(rope_frequencies) elements of each head are rotated: element i with element
    # i + len(rope_frequencies), by position * rope_frequencies[i] radians.
    positions: str = "learned"
    rope_frequencies: tuple[float, ...] = ()
    # the base the frequencies come from
    rope_theta: float = 0.0
    # per pair of elements: which part of a position with several parts it counts; empty where
    # positions are plain numbers
    rope_axes: tuple[int, ...] = ()
    # 'gelu_tanh', 'gelu' or 'silu'
    activation: str = "gelu_tanh"
    # The MLP is down(activation(gate x) * (up x)).
    gated: bool = False
    # Attention and MLP both read the attention norm of the same x.
    parallel: bool = False
    # The output matrix is the embedding table.
    tied: bool = True
    # 'lm' (next token), 'choice' (one score per sequence) or 'classes' (head_size scores per
    # sequence); the last two are read from the last token
    head: str = "lm"
    head_size: int = 0
    # id of the token that ends a text, the first of `stop_tokens`
    eos: int | None = None
    # every id in config.json that ends a text
    stop_tokens: tuple[int, ...] = ()
    # where some MLPs are mixtures of experts
    experts: ExpertsConfig | None = None

    @property
    def q_size(self) -> int:
        """Rows of the q matrix."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the k matrix, and of the v matrix."""
        return self.kv_heads * self.head_dim

    @property
    def mixture(self) -> ExpertsConfig:
        """The experts of a model that has them. Raises ValueError for one that has none; ask
        `sparse` or `experts` first.
        """
        if self.experts is None:
            raise ValueError("this decoder has no mixture of experts")
        return self.experts

    def cache_elements(self, context: int) -> int:
        """Numbers in a KV cache of `context` tokens."""
        return 2 * self.layers * self.kv_size * context

    def sparse(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers

    def has_shared_base(self, layer: int) -> bool:
        """Whether this layer has experts that are stored as one shared matrix and differences."""
        return self.sparse(layer) and self.mixture.has_shared_base

    def mlps(self, layer: int) -> tuple[str, ...]:
        """What stands before 'up' and 'down' in the names of this layer's MLPs.

        ('',) for a dense layer. For a mixture 'experts.J.' of each expert (or 'base.' where they
        share a matrix), and 'shared.' where there is such an expert.
        """
        if not self.sparse(layer):
            return ("",)
        experts = self.mixture
        names = ["base."]
        if not experts.has_shared_base:
            names = [f"experts.{j}." for j in range(experts.count)]
        if experts.shared:
            names.append("shared.")
        return tuple(names)

    def matrices(self, layer: int) -> tuple[str, ...]:
        """The matrices of one layer that may be quantized, in the order in which they are computed.
        Their parts are called 'layers.N.' and then these names.
        """
        names = ["qkv", "o"]
        for mlp in self.mlps(layer):
            names += [f"{mlp}up", f"{mlp}down"]
        return tuple(names)

    def fold_factor(self, layer: int) -> float:
        """What q must be multiplied with so that the plain 1/sqrt(head_dim) scale gives this
        layer's scores.
        """
        return self.score_scale[layer] * self.head_dim**0.5


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of a vision encoder (CLIP or Qwen2-VL's) and of the projector behind it; all sizes in
    elements.
    """

    width: int
    # layers that are computed; `spare` more are stored behind them and never read
    layers: int
    heads: int
    ffn: int
    norm_eps: float
    # 'quick_gelu' or 'gelu'
    activation: str
    # pixels per side of a patch
    patch: int
    # inner size of the two-layer projector
    projector_hidden: int
    # Id that stands for one image feature in a prompt, between `before` and `after`. It may lie
    # outside the vocabulary, for its embedding is never read.
    token: int
    # of RGB in 0..1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # how often a still image is repeated, as frames of a film
    temporal: int = 1
    # patches per side that become one feature
    merge: int = 1
    # (least, most) pixels of an image, which is resized to multiples of patch * merge
    pixels: tuple[int, int] = (0, 0)
    # or the one side that every image gets, in pixels
    size: int = 0
    # how an image becomes a square of that side: 'pad' (to a square of the mean colour, then
    # resized), 'crop' (shortest side resized, the middle cut out) or 'stretch'
    fit: str = "pad"
    # Rotary frequencies over row (first half of the pairs) and column (second half). Empty: there
    # is a learned table and, in front, a class token that is dropped at the end.
    frequencies: tuple[float, ...] = ()
    # There is a norm before the first layer.
    pre_norm: bool = False
    # There is a norm in front of the projector.
    projector_norm: bool = False
    spare: int = 0
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    # the text that becomes `token` where the tokenizer has no token for it
    marker: str = ""
    # ids in front of every prompt
    start: tuple[int, ...] = ()
    # which of its family's conversation forms the model was trained on
    conversation: str = ""
    # config.json names it itself, so it comes before the checkpoint's chat template
    conversation_stated: bool = False

    @property
    def patch_size(self) -> int:
        """Numbers of one patch: 3 colours, `temporal` frames, patch * patch pixels."""
        return 3 * self.temporal * self.patch**2


@dataclass(frozen=True)
class ParamSpec:
    """One canonical part of a model, and the checkpoint modules it is made of (joined along the
    output axis).
    """

    # names of the modules; alternatives for one module are parted by '|'
    modules: tuple[str, ...]
    # 'matrix': weight [out, in], perhaps a bias, may be quantized
    # 'router': a matrix that stays float32, for its rows decide which experts a token uses
    # 'table': weight [rows, width]
    # 'norm': weight [width], perhaps a bias
    # 'delta': what an expert adds to a shared matrix
    # 'index': int32, where it adds it
    kind: str
    # in the layout of `kind`
    shape: tuple[int, ...]
    # stored as [in, out], as GPT-2 does
    conv1d: bool = False
    # A bias may be stored.
    bias: bool = False
    # output rows of each module, where there are several
    rows: tuple[int, ...] = ()
    # where a weight is stored with other axes than `shape` has (a convolution over patches)
    stored_shape: tuple[int, ...] = ()
    # stored under the module's own name, without '.weight'
    bare: bool = False

    def weight(self, module: str) -> str:
        """The name of a module's weight tensor."""
        return module if self.bare else f"{module}.weight"

    def stored(self) -> list[tuple[str, tuple[int, ...]]]:
        """(module, shape of its weight as stored) of each module."""
        shapes = [(rows, *self.shape[1:]) for rows in self.rows or self.shape[:1]]
        if self.stored_shape:
            shapes = [self.stored_shape]
        if self.conv1d:
            shapes = [shape[::-1] for shape in shapes]
        names = [module.split("|")[0] for module in self.modules]
        return list(zip(names, shapes, strict=True))


# tensor name without its prefix -> shape
Shapes = Mapping[str, tuple[int, ...]]
# (config.json, preprocessor_config.json, shapes of the stored tensors) -> numbers of the encoder
ReadVision = Callable[[Mapping[str, Any], Mapping[str, Any], Shapes], VisionConfig]


@dataclass(frozen=True)
class Architecture:
    """What is peculiar to one architecture.

    Canonical names of parts are 'embed', 'positions',
    'layers.N.{attn_norm,qkv,o,mlp_norm,up,down}', 'final_norm', and 'lm_head' or 'head'. qkv holds
    the rows of q, k and v. up holds, where the MLP is gated, the rows of gate and then of up. A
    parallel block has no mlp_norm.

    A layer with experts has router, experts.J.up and experts.J.down, and perhaps shared.up and
    shared.down, in place of up and down. Where experts share a matrix it has base.up, base.down and
    experts.J.{up,down}.{a,b} or .{values,columns}, and .bias.

    Parts of a vision encoder are 'vision.patch', 'vision.layers.N.*' and 'vision.projector.*'.
    'vision.spare.*' is stored and never read.
    """

    name: str
    # what config.json may call it
    model_types: tuple[str, ...]
    # (config.json, shapes of the stored tensors) -> numbers of the text decoder
    decoder: Callable[[Mapping[str, Any], Shapes], DecoderConfig]
    # canonical name -> part
    parts: Callable[[DecoderConfig], dict[str, ParamSpec]]
    # what may stand before the modules' names
    prefixes: tuple[str, ...]
    # endings of stored buffers that carry no information
    ignored: tuple[str, ...]
    # the config after score_scale has been folded into the q rows
    folded: Callable[[Mapping[str, Any]], dict[str, Any]]
    # llama.cpp's name for the graph, '' where it has none
    gguf_arch: str
    # the best-known model and its published true dimensions, for --random-weights
    reference_name: str
    reference_config: Mapping[str, Any]
    # head -> transformers Auto class, for peft
    auto_classes: Mapping[str, str]
    # A GGUF file's key without the graph's name in front -> the key of config.json that says the
    # same; empty where such files cannot be imported.
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    # another graph of llama.cpp, which computes this decoder where a head is not hidden / heads or
    # frequencies are rescaled and the usual one cannot; it rotates elements 2i and 2i+1. '' where
    # there is none.
    gguf_any_head: str = ""
    # llama.cpp's graph rotates elements 2i and 2i+1 of a head, not i and i+half.
    gguf_interleaved: bool = False
    # llama.cpp's graph has RMS norms where the model has layer norms. They are the same where the
    # residual stream has no mean, so the mean is taken out of everything that is added to it.
    gguf_centred: bool = False
    # llama.cpp's name for its graph of vision encoder and projector, '' where none is right
    gguf_projector: str = ""
    # of vision models: numbers of the encoder, and its parts
    vision: ReadVision | None = None
    vision_parts: Callable[[VisionConfig, DecoderConfig], dict[str, ParamSpec]] | None = None
    # last word of a layer's matrix -> whether it has a bias: True, or the flag of config.json that
    # says so, false where it is absent; of the others `parts` says whether a bias may be stored
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    # the family as one config has it, where the text model may be one of several other families'
    variant: Callable[[Mapping[str, Any]], Architecture] | None = None
    # the config under which transformers reads the text model alone; None where it reads the whole
    # checkpoint
    text_config: Callable[[Mapping[str, Any]], dict[str, Any] | None] | None = None
    # (text, number of images, VisionConfig.conversation) -> the prompt of one user turn in the
    # model's own form, with one image token where each image stands
    chat: Callable[[str, int, str], str] | None = None
    # whether it was trained on prompts with several images
    several_images: bool = False
    # a question -> that question with the instructions a reasoning fine-tune was trained with
    reasoning: Callable[[str], str] | None = None
    # a generated text -> the letter its answer names, None where it names none
    answer: Callable[[str], str | None] | None = None
    # what such an answer writes right before that letter
    opening: str = ""
    # (config, times) -> the config of the dense model whose MLPs are `times` as wide
    without_experts: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None
    # (config, rank, density) -> the config of the model whose experts share a matrix
    shared_experts: Callable[[Mapping[str, Any], int, float], dict[str, Any]] | None = None
    # where transformers has no class: which vectors of the authors' own code the decoder is held
    # against instead, for people
    vectors: str = ""
    # transformers' class of a config -> the keys that are read of it. The contract tests hold both
    # against each other; classes that transformers lacks are left out.
    config_keys: Mapping[str, ConfigKeys] = field(default_factory=dict)
    # name -> published true dimensions of the family's other models
    other_references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def every_part(
    family: Architecture, d: DecoderConfig, vision: VisionConfig | None
) -> dict[str, ParamSpec]:
    """All canonical parts of a checkpoint: the text decoder's, and the vision encoder's where there
    is one.
    """
    specs = family.parts(d)
    if vision is not None and family.vision_parts is not None:
        specs = specs | family.vision_parts(vision, d)
    return specs


def all_families() -> dict[str, Architecture]:
    """name -> architecture of every file in families/."""
    return {name: plugins.load("families", name).FAMILY for name in plugins.names("families")}


def family_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The family of a config.json. where: names the file in messages.

    Raises EdgemedError listing the known architectures and the nearest.
    """
    stated = config.get("model_type", "")
    model_type = stated[:80] if isinstance(stated, str) else short(stated)
    families = all_families()
    for family in families.values():
        if model_type in family.model_types:
            return family.variant(config) if family.variant else family
    model_types = [name for family in families.values() for name in family.model_types]
    raise EdgemedError(
        f"{where}: unknown architecture '{model_type or '(no model_type)'}'",
        nearest(model_type, model_types),
    )
