"""A generic decoder in torch, built from a family's values and run layer by layer from disk.

It is the reference every engine is compared with, and calibration runs on it. It exists beside
transformers because it needs the memory of one layer only, and because steps must see the input of
every matrix. A target's module imports it on a device too, so torch is not imported at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import need
from edgemed.inference.session import (
    CarriesVision,
    ImageEmbeddings,
    Positions,
    check_image_embeddings,
    check_room,
    embedding_ids,
)
from edgemed.models.architecture import DecoderConfig
from edgemed.models.weights import CanonicalWeights

if TYPE_CHECKING:
    import torch

    Layer = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
    Cache = tuple[torch.Tensor, torch.Tensor]
    # token ids, or token ids and the embeddings of the images among them
    TokenSequence = Sequence[int] | tuple[list[int], ImageEmbeddings | None]
    # (layer, name, x [.., in]) -> [.., out]: how a matrix is multiplied
    Product = Callable[[Layer, str, torch.Tensor], torch.Tensor]
    # (number of the layer, decoder, layer, x [tokens, hidden]) -> what `routed` gives
    Route = Callable[[int, DecoderConfig, Layer, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SessionState:
    """What a session adds to the computation of one layer.

    cache: (keys, values), each float32 [batch, kv_heads, context, head_dim]. position: of the first
    token; rows from there on are written in place. route: who chooses experts, None for `routed`.
    """

    cache: Cache
    position: int
    route: Route | None = None


def load_layer(weights: CanonicalWeights, n: int) -> Layer:
    """(weight, bias) of each part of layer n, float32, quantized matrices expanded."""
    d = weights.unfolded
    layer: Layer = {}
    for name in ("attn_norm", "mlp_norm"):
        if f"layers.{n}.{name}" in weights.parts:
            layer[name] = weights.norm(f"layers.{n}.{name}")
    names = list(d.matrices(n))
    if d.sparse(n):
        names.append("router")
    for name in names:
        matrix = weights.matrix(f"layers.{n}.{name}")
        layer[name] = (matrix.dense(), matrix.bias)
    if d.has_shared_base(n):
        for j in range(d.mixture.count):
            for last in ("up", "down"):
                delta = weights.delta(f"layers.{n}.experts.{j}.{last}")
                layer[f"experts.{j}.{last}"] = (delta.weight, delta.bias)
    return layer


def layer_elements(weights: CanonicalWeights, n: int) -> int:
    """Numbers of layer n as load_layer holds it. Of experts that share a matrix, every difference
    is held as a full matrix.
    """
    d = weights.unfolded
    has_base = d.has_shared_base(n)
    total = 0
    for name, part in weights.parts.items():
        # The factors of a difference are not held.
        if name.startswith(f"layers.{n}.") and not (has_base and ".experts." in name):
            total += math.prod(part.shape)
    if has_base:
        for last in ("up", "down"):
            shape = weights.parts[f"layers.{n}.base.{last}"].shape
            total += d.mixture.count * math.prod(shape)
    return total


def norm(d: DecoderConfig, layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
    """A norm of the layer over the last axis of x [.., hidden]."""
    torch = need("torch", "build")
    weight, bias = layer[name]
    if d.norm == "rmsnorm":
        return x * (x.square().mean(-1, keepdim=True) + d.norm_eps).rsqrt() * weight
    return torch.nn.functional.layer_norm(x, (d.hidden,), weight, bias, d.norm_eps)


def linear(layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
    """A matrix of the layer times x [.., in], plus its bias: [.., out]."""
    torch = need("torch", "build")
    return torch.nn.functional.linear(x, *layer[name])


def activate(d: DecoderConfig, x: torch.Tensor) -> torch.Tensor:
    """What 'down' reads, from what 'up' gives: [.., ffn], or [.., gate and up] where the MLP is
    gated.
    """
    functional = need("torch", "build").nn.functional
    if d.gated:
        gate, rest = x.chunk(2, -1)
    else:
        gate = x
        rest = None
    if d.activation == "silu":
        gate = functional.silu(gate)
    else:
        approximate = "tanh" if d.activation == "gelu_tanh" else "none"
        gate = functional.gelu(gate, approximate=approximate)
    return gate if rest is None else gate * rest


def rope_angles(d: DecoderConfig, positions: torch.Tensor) -> torch.Tensor:
    """Rotary angles float32 [tokens, pairs] of positions [parts, tokens] (one part where positions
    are plain numbers).
    """
    torch = need("torch", "build")
    # One row per pair of elements: the part of the position that this pair counts.
    per_pair = positions[list(d.rope_axes)] if d.rope_axes else positions[[0]]
    return per_pair.T.float() * torch.tensor(d.rope_frequencies)


def rotated(d: DecoderConfig, x: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
    """x [batch, heads, tokens, head_dim] turned by rope_angles [tokens, pairs]; None: unchanged.

    Pair i of a head is its elements i and i + half. Each pair turns in its plane by its angle
    (Su et al. 2021); elements behind the pairs stay.
    """
    torch = need("torch", "build")
    if angles is None:
        return x
    half = len(d.rope_frequencies)
    cos = angles.cos()
    sin = angles.sin()
    a = x[..., :half]
    b = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(
    d: DecoderConfig,
    n: int,
    qkv: torch.Tensor,
    cache: Cache | None = None,
    position: int = 0,
    angles: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of layer n. qkv [batch, tokens, q+k+v] -> [batch, tokens, hidden].

    cache: (keys, values), each [batch, kv_heads, context, head_dim]; rows from `position` on are
    written in place. angles: rotary angles of the tokens, None where they are counted from
    `position`.
    """
    torch = need("torch", "build")
    batch, tokens, _ = qkv.shape
    if angles is None and d.positions == "rope":
        # Text: every part of a position counts alike.
        counts = torch.arange(position, position + tokens)
        angles = rope_angles(d, counts.expand(max(d.rope_axes, default=0) + 1, -1))
    q, k, v = qkv.split([d.q_size, d.kv_size, d.kv_size], dim=-1)
    q = rotated(d, q.view(batch, tokens, d.heads, d.head_dim).transpose(1, 2), angles)
    k = rotated(d, k.view(batch, tokens, d.kv_heads, d.head_dim).transpose(1, 2), angles)
    v = v.view(batch, tokens, d.kv_heads, d.head_dim).transpose(1, 2)
    end = position + tokens
    if cache is not None:
        cache[0][:, :, position:end] = k
        cache[1][:, :, position:end] = v
        k = cache[0][:, :, :end]
        v = cache[1][:, :, :end]
    # Token i stands at `position` + i and sees everything up to itself: a diagonal moved right by
    # `position`. A single token sees all there is.
    mask = torch.ones(tokens, end, dtype=torch.bool).tril(position) if tokens > 1 else None
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=d.score_scale[n], enable_gqa=d.heads != d.kv_heads
    )
    return out.transpose(1, 2).reshape(batch, tokens, d.q_size)


def block(
    d: DecoderConfig,
    layer: Layer,
    n: int,
    x: torch.Tensor,
    product: Product = linear,
    angles: torch.Tensor | None = None,
    state: SessionState | None = None,
) -> torch.Tensor:
    """One decoder layer: x [batch, tokens, hidden] -> the same shape.

    product: computes a matrix; a step may look at its input. angles: see `attention`. state: of a
    session; None for whole sequences from position 0.
    """
    cache = None
    position = 0
    route = None
    if state is not None:
        cache = state.cache
        position = state.position
        route = state.route
    normed = norm(d, layer, "attn_norm", x)
    qkv = product(layer, "qkv", normed)
    x = x + product(layer, "o", attention(d, n, qkv, cache, position, angles))
    if not d.parallel:
        normed = norm(d, layer, "mlp_norm", x)
    return x + mlp(d, layer, n, normed, product, route)


def mlp(
    d: DecoderConfig,
    layer: Layer,
    n: int,
    x: torch.Tensor,
    product: Product = linear,
    route: Route | None = None,
) -> torch.Tensor:
    """What layer n's MLP or mixture of experts gives for x [.., hidden], the same shape. Of the
    experts only those that some token chose are computed. route: who chooses, None for `routed`.
    """
    if not d.sparse(n):
        return _one_mlp(d, layer, "", x, product)
    torch = need("torch", "build")
    experts = d.mixture
    flat = x.reshape(-1, d.hidden)
    gates, chosen = route(n, d, layer, flat) if route else routed(d, layer, flat)
    y = torch.zeros_like(flat)
    if experts.shared:
        y = _one_mlp(d, layer, "shared.", flat, product)
    if experts.has_shared_base:
        mixed, deltas = shared_base_mixture(d, layer, flat, (gates, chosen), product)
        return (y + deltas + product(layer, "base.down", mixed)).reshape(x.shape)
    for expert in range(experts.count):
        # rows: the tokens that chose this expert; place: as which of their choices
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            outputs = _one_mlp(d, layer, f"experts.{expert}.", flat[rows], product)
            y.index_add_(0, rows, gates[rows, place, None] * outputs)
    return y.reshape(x.shape)


def shared_base_mixture(
    d: DecoderConfig,
    layer: Layer,
    x: torch.Tensor,
    route: tuple[torch.Tensor, torch.Tensor],
    product: Product = linear,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts that share a matrix, for x [tokens, hidden]: (what the shared 'down' reads [tokens,
    ffn], what the experts' own differences give [tokens, hidden]).

    Expert j is down_j(a_j) with up_j = S_up + D_up,j and down_j = S_down + D_down,j, so the mixture
    sum_j g_j down_j(a_j) is S_down (sum_j g_j a_j) + sum_j g_j D_down,j a_j: each shared matrix is
    multiplied once, whatever the number of experts. route: as routed gives it.
    """
    torch = need("torch", "build")
    gates, chosen = route
    common = product(layer, "base.up", x)  # S_up x
    mixed = x.new_zeros(len(x), d.ffn)  # sum_j g_j a_j
    deltas = torch.zeros_like(x)  # sum_j g_j D_down,j a_j
    for expert in range(d.mixture.count):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            gate = gates[rows, place, None]
            inner = activate(d, common[rows] + linear(layer, f"experts.{expert}.up", x[rows]))
            mixed.index_add_(0, rows, gate * inner)
            deltas.index_add_(0, rows, gate * linear(layer, f"experts.{expert}.down", inner))
    return mixed, deltas


def _one_mlp(
    d: DecoderConfig, layer: Layer, name: str, x: torch.Tensor, product: Product
) -> torch.Tensor:
    return product(layer, f"{name}down", activate(d, product(layer, f"{name}up", x)))


def routed(d: DecoderConfig, layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gates, experts chosen), each [tokens, active], for x float32 [tokens, hidden]; see
    ExpertsConfig.

    The authors' top-2 adds noise to the second choice even in evaluation. Here it is always the
    second largest gate (routing.Noisy does as they do).
    """
    experts = d.mixture
    gates, chosen = linear(layer, "router", x).softmax(-1).topk(experts.active, -1)
    if experts.renormalised:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates, chosen


def tables(weights: CanonicalWeights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The embedding tables, float32: of tokens [vocab, hidden] and, where positions are learned, of
    positions [context, hidden].
    """
    positions = None
    if weights.decoder.positions == "learned":
        positions = weights.table("positions")
    return weights.table("embed"), positions


def embed(
    weights: CanonicalWeights,
    tokens: torch.Tensor,
    read: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """tokens [batch, tokens] from position 0 -> hidden states, float32. read: `tables`, where they
    are read already.
    """
    words, positions = read or tables(weights)
    x = words[tokens]
    return x if positions is None else x + positions[: tokens.shape[1]]


def embed_sequences(
    weights: CanonicalWeights, windows: Iterable[TokenSequence]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(hidden states float32 [1, tokens, hidden] before the first layer, rotary angles [tokens,
    pairs] or None for plain positions) of each sequence, with the images among its tokens. The
    tables are read once for all sequences.
    """
    torch = need("torch", "build")
    read = tables(weights)
    for window in windows:
        images: ImageEmbeddings | None = None
        if isinstance(window, tuple):
            tokens, images = window
        else:
            tokens = [int(token) for token in window]
        x = embed(weights, torch.from_numpy(embedding_ids(tokens, images))[None], read)
        if images is None:
            yield x, None
            continue
        _place_images(x, tokens, images)
        angles = None
        if weights.decoder.rope_axes:
            angles = rope_angles(weights.decoder, torch.from_numpy(images.positions))
        yield x, angles


def _place_images(x: torch.Tensor, tokens: Sequence[int], images: ImageEmbeddings) -> None:
    # Image features take the places of the image's token in x [1, tokens, hidden].
    torch = need("torch", "build")
    check_image_embeddings(tokens, images)
    features = torch.from_numpy(np.asarray(images.features, np.float32))
    x[0, torch.tensor(list(tokens)) == images.token] = features


def output_head(weights: CanonicalWeights) -> tuple[Layer, torch.Tensor, torch.Tensor | None]:
    """(layer with the final norm, matrix [width, hidden] that makes scores, its bias)."""
    name = "lm_head" if weights.decoder.head == "lm" else "head"
    matrix = weights.matrix(name)
    return {"final_norm": weights.norm("final_norm")}, matrix.dense(), matrix.bias


def logits(weights: CanonicalWeights, tokens: torch.Tensor) -> torch.Tensor:
    """Scores [batch, tokens, width] of whole sequences, one layer in memory at a time. tokens:
    int64 [batch, tokens].
    """
    torch = need("torch", "build")
    d = weights.decoder
    with torch.inference_mode():
        x = embed(weights, tokens)
        for n in range(d.layers):
            layer = load_layer(weights, n)
            # One sequence after the other: activations stay those of one sequence.
            x = torch.cat([block(d, layer, n, row) for row in x.split(1)])
            del layer  # before the next one is read, or two would be in memory
        final, matrix, bias = output_head(weights)
        return torch.nn.functional.linear(norm(d, final, "final_norm", x), matrix, bias)


class TorchSession(CarriesVision):
    """A checkpoint as a Session, in float32: the source every engine is verified and evaluated
    against.
    """

    def __init__(
        self, weights: CanonicalWeights, resident: bool | None = None, route: Route | None = None
    ):
        """resident: keep all layers in memory; None decides by the memory available. route: who
        chooses experts instead of `routed`.
        """
        torch = need("torch", "build")
        import psutil

        d = weights.decoder
        self.weights = weights
        self.d = d
        self.route = route
        self.head = d.head
        self.context = d.context
        self.position = 0
        needed = 4 * sum(layer_elements(weights, n) for n in range(d.layers))
        if resident is None:
            resident = needed < 0.6 * psutil.virtual_memory().available
        self.layers: list[Layer] | None = None
        if resident:
            self.layers = [load_layer(weights, n) for n in range(d.layers)]
        self.embed, self.positions = tables(weights)
        self.final, self.matrix, self.bias = output_head(weights)
        self.width = self.matrix.shape[0]
        self.counted = Positions(max(d.rope_axes) + 1, d.context) if d.rope_axes else None
        shape = (1, d.kv_heads, d.context, d.head_dim)
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(d.layers)]

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        torch = need("torch", "build")
        check_room(self, tokens)
        with torch.inference_mode():
            end = self.position + len(tokens)
            x = self.embed[torch.from_numpy(embedding_ids(tokens, pictures))][None]
            if self.positions is not None:
                x = x + self.positions[self.position : end]
            if pictures:
                _place_images(x, tokens, pictures)
            angles = None
            if self.counted:
                image_positions = pictures.positions if pictures else None
                placed = self.counted.add(self.position, len(tokens), image_positions)
                angles = rope_angles(self.d, torch.from_numpy(placed))
            for n in range(self.d.layers):
                layer = self.layers[n] if self.layers else load_layer(self.weights, n)
                state = SessionState(self.cache[n], self.position, self.route)
                x = block(self.d, layer, n, x, angles=angles, state=state)
            self.position = end
            if not every:
                x = x[:, -1:]
            normed = norm(self.d, self.final, "final_norm", x)
            return torch.nn.functional.linear(normed, self.matrix, self.bias)[0].numpy()

    def step(self, token: int) -> np.ndarray:
        """Scores [width] after one more token."""
        return self.prefill([token])[0]

    def rewind(self, position: int) -> None:
        """Forget every token from `position` on."""
        self.position = position

    def close(self) -> None:
        """Release the layers kept in memory and the vision encoder."""
        self.close_vision()
        self.layers = None
