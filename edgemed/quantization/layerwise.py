"""One decoder layer rounded, by each of the methods: what a quantize step does between reading a
layer and writing it.

Every method sees the layer as the checkpoint's float weights and the hidden states the rounded
layers before it give, and leaves the hidden states the rounded layer gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edgemed.errors import EdgemedError, need
from edgemed.hardware import process_memory
from edgemed.models.torch_decoder import (
    activate,
    attention,
    linear,
    load_layer,
    mlp,
    norm,
    routed,
    shared_base_mixture,
)
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.awq import Seen, folds, scaled
from edgemed.quantization.gptq import Hessian, Root, Solution, output_error, round_columns
from edgemed.quantization.grids import rtn
from edgemed.quantization.hidden_states import Inputs

if TYPE_CHECKING:
    import torch

    from edgemed.models.architecture import DecoderConfig
    from edgemed.models.torch_decoder import Layer
    from edgemed.quantization.hidden_states import Activations

    # matrix of one layer -> (bits, group size, -1 for one per row)
    Own = Mapping[str, tuple[int, int]]
    # expert -> for each window the tokens it is calibrated on
    Reached = list[list[torch.Tensor]]
    # (matrix of one layer, weight float32 [out, in], the root of its inputs or None where they say
    # nothing) -> (what is stored, the weights it stands for)
    Rounding = Callable[[str, torch.Tensor, Root | None], tuple[Any, torch.Tensor]]


# So many of a matrix' outputs, and not more than twice that, say what share of all of them rounding
# changed.
OUTPUTS = 512


@dataclass(frozen=True)
class Matrix:
    """A rounded matrix, as its Rounding stores it (a Solution). errors: 'weight' |W - W'| / |W|,
    and where there were inputs 'output' |X (W - W')^T|^2 / |X W^T|^2, of up to 2 OUTPUTS rows of W
    at even distances.
    """

    solution: Any
    bias: torch.Tensor | None
    errors: dict[str, float]


@dataclass(frozen=True)
class Rounded:
    """A layer: its matrices, the norms and the router a method changed (weight, bias), AWQ's
    exponents, what `reached` says of its experts, and the largest magnitude of what each matrix
    reads (smoothquant).
    """

    matrices: dict[str, Matrix]
    changed: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)
    experts: dict[str, list[int]] | None = None
    activations: dict[str, float] = field(default_factory=dict)


class Settings(Protocol):
    """What a layer's rounding reads of a step's parameters."""

    damp: float
    act_order: bool
    clip: bool
    correction: float
    expert_tokens: int
    route_at_least: int


def own_of(packings: Mapping[str, tuple[int, int]], n: int) -> Own:
    """Those of layer n, from canonical matrix -> (bits, group)."""
    start = f"layers.{n}."
    return {
        name.removeprefix(start): packing
        for name, packing in packings.items()
        if name.startswith(start)
    }


def rtn_layer(weights: CanonicalWeights, n: int, own: Own, clip: bool) -> Rounded:
    layer = load_layer(weights, n)
    found = {}
    for name, (bits, group) in own.items():
        weight, bias = layer[name]
        solution = Solution(*rtn(weight, bits, group_of(weight, group), clip))
        found[name] = matrix_of(weight, bias, solution, solution.dense(bits))
    return Rounded(found)


def integers(own: Own, params: Settings) -> Rounding:
    """GPTQ's rounding to the integers and scales of (bits, group); to nearest where there is no
    root.
    """

    def rounded(
        name: str, weight: torch.Tensor, root: Root | None
    ) -> tuple[Solution, torch.Tensor]:
        bits = own[name][0]
        group = group_of(weight, own[name][1])
        solution = (
            round_columns(weight, root, bits, group, params.act_order, params.clip)
            if root
            else Solution(*rtn(weight, bits, group))
        )
        return solution, solution.dense(bits)

    return rounded


def gptq_layer(
    weights: CanonicalWeights,
    n: int,
    x: Activations,
    exact: Activations | None,
    rounding: Rounding,
    params: Settings,
) -> Rounded:
    """Matrices in the order they are computed, each calibrated on what the quantized ones before it
    put out, an expert on the tokens that reach it.

    exact: the hidden states where nothing was rounded, for the correction of inputs; None without
    one.
    """
    d = weights.decoder
    layer = load_layer(weights, n)
    source = dict(layer)
    found = {}
    experts = None
    said = None
    for name in d.matrices(n):
        process_memory.return_memory()
        if name.startswith("experts.") and experts is None:
            experts, said = reached(
                d, layer, (feed(d, n, layer, "router", row) for _, row in x), params
            )
        with (
            Inputs(x, layer[name][0].shape[1])
            if added(d, name)
            else contextlib.nullcontext() as inputs
        ):
            found[name] = _gptq(
                d, n, (layer, source), name, (x, exact), experts, rounding, params, inputs
            )
            for i, row in x if inputs else ():
                x.write(i, row + linear(layer, name, inputs.read(i)))
        if inputs:
            del layer[name], source[name]
    # What is added matrix by matrix is at its end; a parallel block and a mixture of experts come
    # as a whole.
    if not added(d, name):
        for stream, own in ((x, layer), (exact, source)) if exact else ((x, layer),):
            for i, row in stream:
                stream.write(i, row + branches(d, own, n, row, x.turned(i)))
    return Rounded(found, experts=said)


def _gptq(
    d: DecoderConfig,
    n: int,
    layers: tuple[Layer, Layer],
    name: str,
    streams: tuple[Activations, Activations | None],
    experts: Reached | None,
    rounding: Rounding,
    params: Settings,
    inputs: Inputs | None,
) -> Matrix:
    """One matrix; its rounded weight takes its place in the first of `layers`, the second stays as
    stored. streams: as gptq_layer's x and exact; inputs: where to keep what it reads.
    """
    (layer, source) = layers
    (x, exact) = streams
    (weight, bias) = layer[name]
    product = None
    hessian = Hessian(weight.shape[1], weight if exact else None)
    for i, row in x:
        rows = rows_of(experts, name, i)
        before = exact.read(i) if exact else None
        read = feed(d, n, source, name, before, rows, x.turned(i)) if exact else None
        # The float layer does not wait for what is rounded: its product is added while its input is
        # at hand.
        product = linear({name: (weight, None)}, name, read) if exact and added(d, name) else None
        given = feed(d, n, layer, name, row, rows, x.turned(i))
        hessian.add(given, read, product)
        if inputs:
            inputs.write(i, given)
        if product is not None:
            exact.write(i, before + (product if bias is None else product + bias))
    if inputs:
        # What made these inputs is at its end: the squares to come have its room.
        for made in layers:
            del made[{"o": "qkv", "down": "up"}[name]]
    if lacking(name, hessian.rows, params):
        solution, dense = rounding(name, weight, None)
    else:
        try:
            root = hessian.root(params.damp, params.act_order)
        except EdgemedError as error:
            raise EdgemedError(f"layers.{n}.{name}: {error.problem}", error.fix) from None
        target = hessian.corrected(root, params.correction) if exact else weight
        solution, dense = rounding(name, target, root)
        del root, target
    layer[name] = (dense, bias)
    return matrix_of(weight, bias, solution, dense, hessian if hessian.rows else None)


def awq_layer(
    weights: CanonicalWeights, n: int, x: Activations, own: Own, params: Settings
) -> Rounded:
    """Scales searched and folded, then rounding to nearest. An expert that too few tokens reach
    takes part in no search; a scale its input has is folded into it all the same.
    """
    d = weights.decoder
    layer = load_layer(weights, n)
    source = dict(layer)
    found = {}
    alpha = {}
    experts = None
    said = None

    def inner() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What attention and what the MLP of the float layer start from, window by window."""
        for i, row in x:
            yield (
                row,
                row
                if d.parallel
                else row + linear(source, "o", feed(d, n, source, "o", row, angles=x.turned(i))),
            )

    if d.sparse(n):
        experts, said = reached(
            d, source, (feed(d, n, source, "router", row) for _, row in inner()), params
        )

    def seen(names: Iterable[str]) -> dict[str, Seen]:
        return _seen(d, n, source, [*names], inner, x, experts, params)

    def rounded(name: str, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        bits, group = own[name]
        return Solution(*rtn(weight, bits, group_of(weight, group), params.clip, importance)).dense(
            bits
        )

    def finish(name: str, inputs: Seen) -> None:
        (weight, bias) = layer[name]
        (bits, group) = own[name]
        clip, importance = (False, None) if inputs.few else (params.clip, inputs.moment.diagonal())
        solution = Solution(*rtn(weight, bits, group_of(weight, group), clip, importance))
        dense = solution.dense(bits)
        found[name] = matrix_of(
            weight, bias, solution, dense, inputs.moment if inputs.rows else None
        )
        layer[name] = (dense, bias)

    # Every `down` of a layer with experts at once would be too much to hold: each is seen, and let
    # go of, by itself.
    inputs = seen(
        [
            *(["router"] if d.sparse(n) else []),
            *(name for name in d.matrices(n) if not name.endswith("down")),
        ]
    )
    for fold in (fold for fold in folds(d, n) if not fold.source.endswith("up")):
        alpha |= scaled(d, fold, layer, inputs, rounded)
    for stem in d.mlps(n):
        up = f"{stem}up"
        down = f"{stem}down"
        inputs |= seen([down])
        for fold in (fold for fold in folds(d, n) if fold.source == up):
            alpha |= scaled(d, fold, layer, inputs, rounded)
        finish(up, inputs.pop(up))
        finish(down, inputs.pop(down))
    for name in ("qkv", "o"):
        finish(name, inputs.pop(name))
    for i, row in x:
        row = (
            row
            if d.parallel
            else row + linear(layer, "o", feed(d, n, layer, "o", row, angles=x.turned(i)))
        )
        x.write(i, row + branches(d, layer, n, row, x.turned(i)))
    changed = {
        name: value
        for name, value in layer.items()
        if name not in own and value is not source[name]
    }
    return Rounded(
        {name: found[name] for name in d.matrices(n)},
        changed,
        alpha,
        said,
    )


def _seen(
    d: DecoderConfig,
    n: int,
    layer: Layer,
    names: list[str],
    inner: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]],
    x: Activations,
    experts: Reached | None,
    params: Settings,
) -> dict[str, Seen]:
    """What matrices read; inner and x: as awq_layer's."""
    torch = need("torch", "build")
    hessians = {name: Hessian(layer[name][0].shape[1]) for name in names}
    sums = {name: torch.zeros(layer[name][0].shape[1]) for name in names}
    for i, (row, middle) in enumerate(inner()):
        for name in names:
            read = feed(
                d,
                n,
                layer,
                name,
                row if name in ("qkv", "o") else middle,
                rows_of(experts, name, i),
                x.turned(i),
            )
            hessians[name].add(read)
            sums[name] += read.abs().sum((0, 1))
    return {
        name: Seen(
            h.moment,
            sums[name] / max(h.rows, 1),
            h.rows,
            lacking(name, h.rows, params),
        )
        for name, h in hessians.items()
    }


def reached(
    d: DecoderConfig, layer: Layer, reads: Iterable[torch.Tensor], params: Settings
) -> tuple[Reached, dict[str, list[int]]]:
    """(expert -> for each window the tokens it is calibrated on, what the manifest says of it).
    reads: what the router reads, float32 [1, tokens, hidden] per window.

    tokens: how many chose each expert; forced: how many were added to reach route_at_least;
    rounded: experts below expert_tokens all the same.
    """
    torch = need("torch", "build")
    gates = []
    uses = []
    for read in reads:
        flat = read.reshape(-1, d.hidden)
        gates.append(linear(layer, "router", flat).softmax(-1))
        uses.append(
            torch.zeros_like(gates[-1], dtype=torch.bool).scatter_(
                1, routed(d, layer, flat)[1], True
            )
        )
    windows = len(uses)
    scores = torch.cat(gates)
    chosen = torch.cat(uses)
    tokens = chosen.sum(0).tolist()
    for expert, count in enumerate(tokens):
        missing = min(params.route_at_least, len(chosen)) - count
        if missing > 0:
            chosen[
                scores[:, expert].masked_fill(chosen[:, expert], -1).topk(missing).indices, expert
            ] = True
    total = chosen.sum(0).tolist()
    said = {
        "tokens": tokens,
        "forced": [t - c for t, c in zip(total, tokens, strict=True)],
        "rounded": [e for e, t in enumerate(total) if t < params.expert_tokens],
    }
    return [
        [window.nonzero(as_tuple=True)[0] for window in column.chunk(windows)]
        for column in chosen.T
    ], said


def rows_of(experts: Reached | None, name: str, window: int) -> torch.Tensor | None:
    """The tokens of a window that a matrix is calibrated on; None for all."""
    return experts[int(name.split(".")[1])][window] if name.startswith("experts.") else None


def lacking(name: str, rows: int, params: Settings) -> bool:
    """Whether a matrix is an expert's that too few tokens reached to say anything about it: it is
    rounded to nearest.
    """
    return name.startswith("experts.") and rows < params.expert_tokens


def branches(
    d: DecoderConfig, layer: Layer, n: int, x: torch.Tensor, angles: torch.Tensor | None = None
) -> torch.Tensor:
    """What a finished layer still has to add to x: its MLP, and in a parallel block its attention
    too.
    """
    y = mlp(d, layer, n, norm(d, layer, "attn_norm" if d.parallel else "mlp_norm", x))
    return y + linear(layer, "o", feed(d, n, layer, "o", x, angles=angles)) if d.parallel else y


def feed(
    d: DecoderConfig,
    n: int,
    layer: Layer,
    name: str,
    x: torch.Tensor,
    rows: torch.Tensor | None = None,
    angles: torch.Tensor | None = None,
) -> torch.Tensor:
    """The input of a matrix or router, from the hidden state at the start of its half of the layer
    (of the layer, where the block is parallel).

    x [1, tokens, hidden]; rows: which of the tokens, None for all; angles: rotary angles where the
    tokens are not counted from 0.
    """
    if name == "qkv":
        return norm(d, layer, "attn_norm", x)
    if name == "o":
        return attention(d, n, linear(layer, "qkv", norm(d, layer, "attn_norm", x)), angles=angles)
    read = norm(d, layer, "attn_norm" if d.parallel else "mlp_norm", x)
    read = read if rows is None else read[:, rows]
    if name == "base.down":
        flat = read.reshape(-1, d.hidden)
        return shared_base_mixture(d, layer, flat, routed(d, layer, flat))[0][None]
    return (
        activate(d, linear(layer, f"{name.removesuffix('down')}up", read))
        if name.endswith("down")
        else read
    )


def added(d: DecoderConfig, name: str) -> bool:
    """Whether the product of this matrix, by itself, is added to the hidden state."""
    return not d.parallel and name in ("o", "down")


def group_of(weight: torch.Tensor, group: int) -> int:
    return weight.shape[1] if group == -1 else group


def matrix_of(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    solution: Any,
    dense: torch.Tensor,
    inputs: Hessian | torch.Tensor | None = None,
) -> Matrix:
    """dense: the weights the solution stands for; inputs: what the matrix reads, or its second
    moment [in, in]; None where it read nothing.
    """
    errors = {"weight": float((weight - dense).norm() / weight.norm().clamp_min(1e-30))}
    if inputs is not None:
        some = slice(None, None, max(len(weight) // OUTPUTS, 1))
        weight = weight[some]
        dense = dense[some]
        errors["output"] = (
            inputs.output_error(weight, dense)
            if isinstance(inputs, Hessian)
            else output_error(weight, dense, inputs)
        )
    return Matrix(solution, bias, errors)
