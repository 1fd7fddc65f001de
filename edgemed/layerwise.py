"""One decoder layer rounded, by each of the methods: what a quantize step does between reading a layer and writing it.

Every method sees the layer as the checkpoint's float weights and the hidden states the rounded layers before it give, and leaves the
hidden states the rounded layer gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgemed.awq import scaled
from edgemed.decoder import activate, attention, linear, load_layer, norm
from edgemed.errors import EdgemedError, need
from edgemed.gptq import Hessian, Solution, corrected, output_error, solve
from edgemed.grid import rtn
from edgemed.weights import MATRICES, Weights

if TYPE_CHECKING:
    import torch

    from edgemed.activations import Activations
    from edgemed.decoder import Layer
    from edgemed.family import Decoder

    # matrix of one layer -> (bits, group size, -1 for one per row)
    Own = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Matrix:
    """A rounded matrix. errors: 'weight' |W - W'| / |W|, and where there were inputs 'output' |X (W - W')^T|^2 / |X W^T|^2."""

    solution: Solution
    bias: torch.Tensor | None
    errors: dict[str, float]


@dataclass(frozen=True)
class Rounded:
    """A layer: its matrices, the norms a method changed (weight, bias), and AWQ's exponents."""

    matrices: dict[str, Matrix]
    norms: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)


class Settings(Protocol):
    """What gptq_layer reads of a step's parameters."""

    damp: float
    act_order: bool
    clip: bool
    correction: float


def rtn_layer(weights: Weights, n: int, packings: dict[str, tuple[int, int]], clip: bool) -> Rounded:
    """packings: canonical matrix -> (bits, group)."""
    layer, found = load_layer(weights, n), {}
    for name in MATRICES:
        weight, bias = layer[name]
        bits, group = packings[f"layers.{n}.{name}"]
        solution = Solution(*rtn(weight, bits, group_of(weight, group), clip))
        found[name] = Matrix(solution, bias, {"weight": weight_error(weight, solution.dense(bits))})
    return Rounded(found)


def gptq_layer(weights: Weights, n: int, x: Activations, exact: Activations | None, own: Own, params: Settings) -> Rounded:
    """Matrices in the order they are computed, each calibrated on what the quantized ones before it put out.

    exact: the hidden states where nothing was rounded, for the correction of inputs; None without one.
    """
    d = weights.decoder
    layer = load_layer(weights, n)
    source, found = dict(layer), {}
    known = feeds(d, n, source)
    for name, feed in feeds(d, n, layer).items():
        (weight, bias), (bits, group) = layer[name], own[name]
        hessian = Hessian(weight.shape[1], exact is not None)
        for i, row in x:
            hessian.add(feed(row), known[name](exact.read(i)) if exact else None)
        try:
            target = corrected(weight, hessian, params.correction, params.damp) if exact else weight
            solution = solve(target, hessian.moment, bits, group_of(weight, group), params.damp, params.act_order, params.clip)
        except EdgemedError as error:
            raise EdgemedError(f"layers.{n}.{name}: {error.problem}", error.fix) from None
        rounded = solution.dense(bits)
        errors = {"weight": weight_error(weight, rounded), "output": output_error(weight, rounded, hessian.moment)}
        found[name], layer[name] = Matrix(solution, bias, errors), (rounded, bias)
        # A parallel block's MLP reads the layer's own input: nothing is added before its end.
        if name == "o" and not d.parallel:
            for i, row in x:
                x.write(i, row + linear(layer, "o", feed(row)))
                if exact:
                    before = exact.read(i)
                    exact.write(i, before + linear(source, "o", known["o"](before)))
    for i, row in x:
        x.write(i, row + branches(d, layer, n, row))
        if exact:
            before = exact.read(i)
            exact.write(i, before + branches(d, source, n, before))
    return Rounded(found)


def awq_layer(weights: Weights, n: int, x: Activations, own: Own, clip: bool) -> Rounded:
    """Scales searched and folded, then rounding to nearest."""
    torch = need("torch", "build")
    d, layer = weights.decoder, load_layer(weights, n)
    hessians = {name: Hessian(layer[name][0].shape[1]) for name in MATRICES}
    magnitudes, rows = {name: torch.zeros(layer[name][0].shape[1]) for name in MATRICES}, x.shape[0] * x.shape[1]
    for _, row in x:
        inner = row if d.parallel else row + linear(layer, "o", feeds(d, n, layer)["o"](row))
        for name, feed in feeds(d, n, layer).items():
            read = feed(row if name in ("qkv", "o") else inner)
            hessians[name].add(read)
            magnitudes[name] += read.abs().sum((0, 1)) / rows
    moments, source = {name: hessian.moment for name, hessian in hessians.items()}, dict(layer)

    def rounded(name: str, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        bits, group = own[name]
        return Solution(*rtn(weight, bits, group_of(weight, group), clip, importance)).dense(bits)

    alpha, found = scaled(d, layer, magnitudes, moments, rounded), {}
    for name in MATRICES:
        (weight, bias), (bits, group), moment = layer[name], own[name], moments[name]
        solution = Solution(*rtn(weight, bits, group_of(weight, group), clip, moment.diagonal()))
        dense = solution.dense(bits)
        found[name] = Matrix(solution, bias, {"weight": weight_error(weight, dense), "output": output_error(weight, dense, moment)})
        layer[name] = (dense, bias)
    for i, row in x:
        row = row if d.parallel else row + linear(layer, "o", feeds(d, n, layer)["o"](row))
        x.write(i, row + branches(d, layer, n, row))
    return Rounded(found, {name: value for name, value in layer.items() if name not in MATRICES and value is not source[name]}, alpha)


def branches(d: Decoder, layer: Layer, n: int, x: torch.Tensor) -> torch.Tensor:
    """What a finished layer still has to add to x: its MLP, and in a parallel block its attention too."""
    found = feeds(d, n, layer)
    mlp = linear(layer, "down", found["down"](x))
    return mlp + linear(layer, "o", found["o"](x)) if d.parallel else mlp


def feeds(d: Decoder, n: int, layer: Layer) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """matrix -> its input, from the hidden state at the start of its half of the layer (of the layer, where the block is parallel).

    Reads `layer` as it is when called.
    """
    before = "attn_norm" if d.parallel else "mlp_norm"
    return {
        "qkv": lambda x: norm(d, layer, "attn_norm", x),
        "o": lambda x: attention(d, n, linear(layer, "qkv", norm(d, layer, "attn_norm", x))),
        "up": lambda x: norm(d, layer, before, x),
        "down": lambda x: activate(d, linear(layer, "up", norm(d, layer, before, x))),
    }


def group_of(weight: torch.Tensor, group: int) -> int:
    return weight.shape[1] if group == -1 else group


def weight_error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((weight - rounded).norm() / weight.norm().clamp_min(1e-30))
