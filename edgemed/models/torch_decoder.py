"""A generic decoder in torch, built from a family's values and run layer by layer from disk.

It is the reference every engine is compared with and the pass calibration runs on. It exists beside
transformers because it needs the memory of one layer only, and because steps must see the input of
every matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    # token ids, or those and the images among them
    Window = Sequence[int] | tuple[list[int], ImageEmbeddings | None]
    Product = Callable[[Layer, str, torch.Tensor], torch.Tensor]
    # (number of the layer, decoder, layer, x [tokens, hidden]) -> what `routed` gives
    Route = Callable[[int, DecoderConfig, Layer, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def load_layer(weights: CanonicalWeights, n: int) -> Layer:
    """(weight, bias) of each part of layer n, float32, quantized matrices expanded."""
    d = weights.source
    norms = [name for name in ("attn_norm", "mlp_norm") if f"layers.{n}.{name}" in weights.parts]
    layer: Layer = {name: weights.norm(f"layers.{n}.{name}") for name in norms}
    for name in (*d.matrices(n), *(("router",) if d.sparse(n) else ())):
        matrix = weights.matrix(f"layers.{n}.{name}")
        layer[name] = (matrix.dense(), matrix.bias)
    for name in (
        (f"experts.{j}.{last}" for j in range(d.experts.count) for last in ("up", "down"))
        if d.sparse(n) and d.experts.based
        else ()
    ):
        own = weights.delta(f"layers.{n}.{name}")
        layer[name] = (own.weight, own.bias)
    return layer


def loaded(weights: CanonicalWeights, n: int) -> int:
    """Numbers of layer n as load_layer holds it: of experts that share a matrix every difference
    whole.
    """
    d = weights.source
    shapes = {
        name: part.shape for name, part in weights.parts.items() if name.startswith(f"layers.{n}.")
    }
    whole = (
        d.experts.count
        * sum(math.prod(shapes[f"layers.{n}.base.{last}"]) for last in ("up", "down"))
        if d.sparse(n) and d.experts.based
        else 0
    )
    return whole + sum(
        math.prod(shape) for name, shape in shapes.items() if ".experts." not in name or not whole
    )


def norm(d: DecoderConfig, layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    weight, bias = layer[name]
    if d.norm == "rmsnorm":
        return x * (x.square().mean(-1, keepdim=True) + d.norm_eps).rsqrt() * weight
    return torch.nn.functional.layer_norm(x, (d.hidden,), weight, bias, d.norm_eps)


def linear(layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    return torch.nn.functional.linear(x, *layer[name])


def activate(d: DecoderConfig, x: torch.Tensor) -> torch.Tensor:
    """What 'down' reads, from what 'up' gives: [.., ffn], or [.., gate and up] where the MLP is
    gated.
    """
    torch = need("torch", "build")
    gate, x = x.chunk(2, -1) if d.gated else (x, None)
    if d.activation == "silu":
        gate = torch.nn.functional.silu(gate)
    else:
        gate = torch.nn.functional.gelu(
            gate, approximate="tanh" if d.activation == "gelu_tanh" else "none"
        )
    return gate if x is None else gate * x


def rope_angles(d: DecoderConfig, positions: torch.Tensor) -> torch.Tensor:
    """Rotary angles float32 [tokens, pairs] of positions [parts, tokens] (one part where positions
    are plain numbers).
    """
    torch = need("torch", "build")
    counted = positions[list(d.rope_axes)] if d.rope_axes else positions[[0]]
    return counted.T.float() * torch.tensor(d.rope_frequencies)


def rotated(d: DecoderConfig, x: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
    """x [batch, heads, tokens, head_dim] turned by rope_angles, where the model has them."""
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
        angles = rope_angles(
            d, torch.arange(position, position + tokens).expand(max(d.rope_axes, default=0) + 1, -1)
        )
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
    cache: Cache | None = None,
    position: int = 0,
    product: Product = linear,
    angles: torch.Tensor | None = None,
    route: Route | None = None,
) -> torch.Tensor:
    """One decoder layer: x [batch, tokens, hidden] -> the same shape. product(layer, name, x)
    computes a matrix; a step may look at its input. route: who chooses experts instead of
    `routed`.
    """
    read = norm(d, layer, "attn_norm", x)
    branch = product(
        layer, "o", attention(d, n, product(layer, "qkv", read), cache, position, angles)
    )
    x = x + branch
    read = read if d.parallel else norm(d, layer, "mlp_norm", x)
    return x + mlp(d, layer, n, read, product, route)


def mlp(
    d: DecoderConfig,
    layer: Layer,
    n: int,
    x: torch.Tensor,
    product: Product = linear,
    route: Route | None = None,
) -> torch.Tensor:
    """What layer n's MLP or mixture of experts gives for x [.., hidden], the same shape. Of the
    experts only those some token chose are computed.
    """
    if not d.sparse(n):
        return _one_mlp(d, layer, "", x, product)
    torch = need("torch", "build")
    flat = x.reshape(-1, d.hidden)
    gates, chosen = route(n, d, layer, flat) if route else routed(d, layer, flat)
    y = _one_mlp(d, layer, "shared.", flat, product) if d.experts.shared else torch.zeros_like(flat)
    if d.experts.based:
        mixed, own = based(d, layer, flat, (gates, chosen), product)
        return (y + own + product(layer, "base.down", mixed)).reshape(x.shape)
    for expert in range(d.experts.count):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            y.index_add_(
                0,
                rows,
                gates[rows, place, None]
                * _one_mlp(d, layer, f"experts.{expert}.", flat[rows], product),
            )
    return y.reshape(x.shape)


def based(
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
    (gates, chosen) = route
    common = product(layer, "base.up", x)
    mixed = x.new_zeros(len(x), d.ffn)
    own = torch.zeros_like(x)
    for expert in range(d.experts.count):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            inner = activate(d, common[rows] + linear(layer, f"experts.{expert}.up", x[rows]))
            mixed.index_add_(0, rows, gates[rows, place, None] * inner)
            own.index_add_(
                0, rows, gates[rows, place, None] * linear(layer, f"experts.{expert}.down", inner)
            )
    return mixed, own


def _one_mlp(
    d: DecoderConfig, layer: Layer, name: str, x: torch.Tensor, product: Product
) -> torch.Tensor:
    return product(layer, f"{name}down", activate(d, product(layer, f"{name}up", x)))


def routed(d: DecoderConfig, layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gates, experts chosen), each [tokens, active], for x float32 [tokens, hidden]; see Experts.

    The authors' top-2 adds noise to the second choice even in evaluation; here it is the second
    largest, always (routing.Noisy does as they do).
    """
    gates, chosen = linear(layer, "router", x).softmax(-1).topk(d.experts.active, -1)
    return (gates / gates.sum(-1, keepdim=True) if d.experts.renormalised else gates), chosen


def tables(weights: CanonicalWeights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of words [vocab, hidden] and, where they are learned, of positions [context, hidden],
    float32.
    """
    return weights.table("embed"), weights.table(
        "positions"
    ) if weights.decoder.positions == "learned" else None


def embed(
    weights: CanonicalWeights,
    tokens: torch.Tensor,
    known: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """tokens [batch, tokens] from position 0 -> hidden states, float32. known: `tables`, where they
    are read already.
    """
    words, positions = known or tables(weights)
    x = words[tokens]
    return x if positions is None else x + positions[: tokens.shape[1]]


def shown(
    weights: CanonicalWeights, windows: Iterable[Window]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(hidden states float32 [1, tokens, hidden] before the first layer, rotary angles [tokens,
    pairs] or None for plain positions) of each window's tokens and the images among them. The
    tables are read once for all windows.
    """
    torch = need("torch", "build")
    known = tables(weights)
    for window in windows:
        tokens, pictures = (
            window if isinstance(window, tuple) else ([int(token) for token in window], None)
        )
        x = embed(weights, torch.from_numpy(embedding_ids(tokens, pictures))[None], known)
        if pictures is None:
            yield x, None
            continue
        check_image_embeddings(tokens, pictures)
        x[0, torch.tensor(list(tokens)) == pictures.token] = torch.from_numpy(
            np.asarray(pictures.features, np.float32)
        )
        yield (
            x,
            rope_angles(weights.decoder, torch.from_numpy(pictures.positions))
            if weights.decoder.rope_axes
            else None,
        )


def top(weights: CanonicalWeights) -> tuple[Layer, torch.Tensor, torch.Tensor | None]:
    """The final norm, and the matrix [width, hidden] (with bias) that makes scores."""
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
        final, matrix, bias = top(weights)
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
        needed = 4 * sum(loaded(weights, n) for n in range(d.layers))
        if resident is None:
            resident = needed < 0.6 * psutil.virtual_memory().available
        self.layers = [load_layer(weights, n) for n in range(d.layers)] if resident else None
        self.embed = weights.table("embed")
        self.positions = weights.table("positions") if d.positions == "learned" else None
        self.final, self.matrix, self.bias = top(weights)
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
            x = x + self.positions[self.position : end] if self.positions is not None else x
            if pictures:
                check_image_embeddings(tokens, pictures)
                x[0, torch.tensor(list(tokens)) == pictures.token] = torch.from_numpy(
                    np.asarray(pictures.features, np.float32)
                )
            angles = None
            if self.counted:
                placed = self.counted.add(
                    self.position, len(tokens), pictures.positions if pictures else None
                )
                angles = rope_angles(self.d, torch.from_numpy(placed))
            for n in range(self.d.layers):
                layer = self.layers[n] if self.layers else load_layer(self.weights, n)
                x = block(
                    self.d,
                    layer,
                    n,
                    x,
                    self.cache[n],
                    self.position,
                    angles=angles,
                    route=self.route,
                )
            self.position = end
            x = x if every else x[:, -1:]
            return torch.nn.functional.linear(
                norm(self.d, self.final, "final_norm", x), self.matrix, self.bias
            )[0].numpy()

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])[0]

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        self.close_vision()
        self.layers = None
