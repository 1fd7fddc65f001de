"""One decoder layer quantized: what the methods have in common, and GPTQ's walk through the
matrices of a layer, for every kind of integer grid.

Every method sees the layer as the checkpoint's float weights and the hidden states that the
quantized layers before it give. It leaves the hidden states that the quantized layer gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from edgemed.errors import EdgemedError
from edgemed.hardware import process_memory
from edgemed.models.architecture import DecoderConfig
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
from edgemed.quantization.expert_coverage import (
    ExpertTokens,
    expert_tokens,
    rows_of,
    too_few_tokens,
)
from edgemed.quantization.gptq import Hessian, InverseFactor, output_error
from edgemed.quantization.hidden_states import Activations, Inputs
from edgemed.quantization.settings import Packings, QuantizeSettings

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer

# (matrix of one layer, weight float32 [out, in], the inverse factor of its inputs or None where
# they say nothing) -> (what is stored, the weights it stands for)
Quantizer = Callable[[str, torch.Tensor, InverseFactor | None], tuple[Any, torch.Tensor]]

# So many rows of a matrix, and at most twice that, tell what share of its output quantization
# changed.
MEASURED_ROWS = 512


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix as its quantizer stores it (a Solution).

    errors: 'weight' |W - W'| / |W|, and where there were inputs 'output' |X (W - W')^T|^2 / |X
    W^T|^2, of up to 2 MEASURED_ROWS rows of W at even distances.
    """

    solution: Any
    bias: torch.Tensor | None
    errors: dict[str, float]


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as a method leaves it.

    changed: the norms and the router that the method changed (weight, bias). alpha: AWQ's
    exponents, None for other methods. experts: what `expert_tokens` says of them. activations: the
    largest magnitude of what each matrix reads (smoothquant).
    """

    matrices: dict[str, QuantizedMatrix]
    changed: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    alpha: dict[str, float] | None = None
    experts: dict[str, list[int]] | None = None
    activations: dict[str, float] = field(default_factory=dict)


@dataclass
class _LayerPass:
    """One layer while GPTQ walks through it.

    layer: its weights, each matrix quantized once it was its turn. source: the float weights. x,
    exact: hidden states of the quantized and of the float model; exact is None without correction.
    """

    d: DecoderConfig
    n: int
    layer: Layer
    source: Layer
    x: Activations
    exact: Activations | None
    quantizer: Quantizer
    settings: QuantizeSettings
    experts: ExpertTokens | None = None


def layer_packings(packings: Packings, n: int) -> Packings:
    """Those of layer n by the matrix' name in it, from canonical matrix -> (bits, group)."""
    start = f"layers.{n}."
    return {
        name.removeprefix(start): packing
        for name, packing in packings.items()
        if name.startswith(start)
    }


def gptq_layer(
    weights: CanonicalWeights,
    n: int,
    x: Activations,
    exact: Activations | None,
    quantizer: Quantizer,
    settings: QuantizeSettings,
) -> QuantizedLayer:
    """Matrices in the order they are computed, each calibrated on what the quantized ones before it
    put out, an expert on the tokens that reach it.

    exact: the hidden states of the float model, for the correction of inputs; None without one.
    Raises EdgemedError where the text gives no invertible second moment.
    """
    d = weights.decoder
    layer = load_layer(weights, n)
    work = _LayerPass(
        d=d,
        n=n,
        layer=layer,
        source=dict(layer),
        x=x,
        exact=exact,
        quantizer=quantizer,
        settings=settings,
    )
    matrices = {}
    coverage = None
    for name in d.matrices(n):
        process_memory.return_memory()
        if name.startswith("experts.") and work.experts is None:
            reads = (input_of(d, n, layer, "router", row) for _, row in x)
            work.experts, coverage = expert_tokens(d, layer, reads, settings)
        if is_added(d, name):
            matrices[name] = _added_matrix(work, name)
        else:
            matrices[name] = _one_matrix(work, name, None)
    # What is added matrix by matrix is at its end; a parallel block and a mixture of experts come
    # as a whole.
    if not is_added(d, name):
        for i, row in x:
            x.write(i, row + rest_of_layer(d, layer, n, row, x.angles_of(i)))
        if exact is not None:
            for i, row in exact:
                exact.write(i, row + rest_of_layer(d, work.source, n, row, exact.angles_of(i)))
    return QuantizedLayer(matrices, experts=coverage)


def _added_matrix(work: _LayerPass, name: str) -> QuantizedMatrix:
    """A matrix whose product is added to the hidden states at once. Its inputs are kept on disk
    meanwhile, so that they are not computed twice.
    """
    with Inputs(work.x, work.layer[name][0].shape[1]) as inputs:
        matrix = _one_matrix(work, name, inputs)
        for i, row in work.x:
            work.x.write(i, row + linear(work.layer, name, inputs.read(i)))
    del work.layer[name], work.source[name]
    return matrix


def _one_matrix(work: _LayerPass, name: str, inputs: Inputs | None) -> QuantizedMatrix:
    """One matrix; its quantized weight takes its place in `work.layer`. inputs: where to keep what
    it reads.
    """
    settings = work.settings
    weight, bias = work.layer[name]
    hessian = _hessian_of(work, name, inputs)
    if inputs is not None:
        # What made these inputs is at its end: the squares to come have its room.
        maker = {"o": "qkv", "down": "up"}[name]
        del work.layer[maker]
        del work.source[maker]
    if too_few_tokens(name, hessian.rows, settings):
        solution, dense = work.quantizer(name, weight, None)
    else:
        try:
            factor = hessian.inverse_factor(settings.damp, settings.act_order)
        except EdgemedError as error:
            raise EdgemedError(f"layers.{work.n}.{name}: {error.problem}", error.fix) from None
        target = weight
        if work.exact is not None:
            target = hessian.corrected(factor, settings.correction)
        solution, dense = work.quantizer(name, target, factor)
        del factor, target
    work.layer[name] = (dense, bias)
    return with_errors(weight, bias, solution, dense, hessian if hessian.rows else None)


def _hessian_of(work: _LayerPass, name: str, inputs: Inputs | None) -> Hessian:
    """The moments of what a matrix reads. The float hidden states go on by its product where that
    is added at once.
    """
    d = work.d
    exact = work.exact
    weight, bias = work.layer[name]
    hessian = Hessian(weight.shape[1], weight if exact else None)
    for i, row in work.x:
        rows = rows_of(work.experts, name, i)
        angles = work.x.angles_of(i)
        exact_input = None
        product = None
        if exact is not None:
            before = exact.read(i)
            exact_input = input_of(d, work.n, work.source, name, before, rows, angles)
            if is_added(d, name):
                # The float layer does not wait for what is quantized: its product is added while
                # its input is at hand.
                product = linear({name: (weight, None)}, name, exact_input)
        own_input = input_of(d, work.n, work.layer, name, row, rows, angles)
        hessian.add(own_input, exact_input, product)
        if inputs is not None:
            inputs.write(i, own_input)
        if exact is not None and product is not None:
            exact.write(i, before + (product if bias is None else product + bias))
    return hessian


def rest_of_layer(
    d: DecoderConfig, layer: Layer, n: int, x: torch.Tensor, angles: torch.Tensor | None = None
) -> torch.Tensor:
    """What a finished layer still has to add to x: its MLP, and in a parallel block its attention
    too.
    """
    y = mlp(d, layer, n, norm(d, layer, "attn_norm" if d.parallel else "mlp_norm", x))
    if d.parallel:
        return y + linear(layer, "o", input_of(d, n, layer, "o", x, angles=angles))
    return y


def before_mlp(
    d: DecoderConfig, layer: Layer, n: int, x: torch.Tensor, angles: torch.Tensor | None
) -> torch.Tensor:
    """The hidden state that the MLP starts from: behind attention, in a parallel block x itself."""
    if d.parallel:
        return x
    return x + linear(layer, "o", input_of(d, n, layer, "o", x, angles=angles))


def input_of(
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

    x float32 [1, tokens, hidden]; rows: which of the tokens, None for all; angles: rotary angles
    where the tokens are not counted from 0.
    """
    if name == "qkv":
        return norm(d, layer, "attn_norm", x)
    if name == "o":
        return attention(d, n, linear(layer, "qkv", norm(d, layer, "attn_norm", x)), angles=angles)
    read = norm(d, layer, "attn_norm" if d.parallel else "mlp_norm", x)
    if rows is not None:
        read = read[:, rows]
    if name == "base.down":
        flat = read.reshape(-1, d.hidden)
        return shared_base_mixture(d, layer, flat, routed(d, layer, flat))[0][None]
    if name.endswith("down"):
        return activate(d, linear(layer, f"{name.removesuffix('down')}up", read))
    return read


def is_added(d: DecoderConfig, name: str) -> bool:
    """Whether the product of this matrix, by itself, is added to the hidden state."""
    return not d.parallel and name in ("o", "down")


def group_of(weight: torch.Tensor, group: int) -> int:
    """Inputs per scale of a weight [out, in]; -1 stands for a whole row."""
    return weight.shape[1] if group == -1 else group


def with_errors(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    solution: Any,
    dense: torch.Tensor,
    inputs: Hessian | torch.Tensor | None = None,
) -> QuantizedMatrix:
    """A quantized matrix with its errors measured.

    dense: the weights the solution stands for; inputs: what the matrix reads, or its second moment
    [in, in]; None where it read nothing.
    """
    errors = {"weight": float((weight - dense).norm() / weight.norm().clamp_min(1e-30))}
    if inputs is not None:
        some = slice(None, None, max(len(weight) // MEASURED_ROWS, 1))
        if isinstance(inputs, Hessian):
            errors["output"] = inputs.output_error(weight[some], dense[some])
        else:
            errors["output"] = output_error(weight[some], dense[some], inputs)
    return QuantizedMatrix(solution, bias, errors)


def changed_parts(
    layer: Layer, source: Layer, packings: Packings
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """The parts of a layer, its quantized matrices apart, that are not those of `source` any
    more.
    """
    return {
        name: value
        for name, value in layer.items()
        if name not in packings and value is not source[name]
    }
