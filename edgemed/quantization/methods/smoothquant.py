"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): activations with a few large channels are made
even before both they and the weights become int8.

Column j of a matrix is multiplied by s_j = max|x_j|^a / max|w_j|^(1-a) and its input divided by it,
which changes nothing in floats. The division goes where AWQ's goes (scale_folding.py), so the
checkpoint stays a plain one; the input of a plain MLP's `down` comes out of the activation alone
and stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig
from edgemed.models.torch_decoder import load_layer
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.gptq import Hessian, Solution
from edgemed.quantization.grids import rtn
from edgemed.quantization.hidden_states import Activations
from edgemed.quantization.layerwise import (
    QuantizedLayer,
    before_mlp,
    changed_parts,
    group_of,
    input_of,
    rest_of_layer,
    with_errors,
)
from edgemed.quantization.memory_budget import moments_at_once
from edgemed.quantization.method import LayerMethod
from edgemed.quantization.scale_folding import apply, folds, shared_by_source
from edgemed.quantization.settings import Packings, QuantizeSettings

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer

# bits and group: int8 with one scale per output.
PACKING = (8, -1)
FLOOR = 1e-5  # SmoothQuant's own floor for magnitudes and scales


def scale(largest: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [in] of the paper's equation 4. largest: max |x| per column [in]; weight [out, in], all
    rows that read this input.
    """
    activations = largest.clamp_min(FLOOR) ** alpha
    rows = weight.abs().amax(0).clamp_min(FLOOR) ** (1 - alpha)
    return (activations / rows).clamp_min(FLOOR)


def quantize_layer(
    weights: CanonicalWeights,
    n: int,
    streams: Sequence[Activations],
    packings: Packings,
    settings: QuantizeSettings,
) -> QuantizedLayer:
    """Layer n, without experts, smoothed and quantized by RTN. The hidden states become those that
    the quantized layer gives, its activations kept float.

    QuantizedLayer.activations: the largest magnitude of what each matrix reads after smoothing.
    """
    d = weights.decoder
    x = streams[0]
    layer = load_layer(weights, n)
    source = dict(layer)
    moments, largest = _statistics(d, n, source, x, list(packings))
    for fold in folds(d, n):
        # What one row makes must get one scale: heads that share a value row share the largest of
        # it and of the weights that read it.
        shared = shared_by_source(d, fold, largest[fold.fed[0]], "max")
        joined = torch.cat([layer[name][0] for name in fold.fed]).abs().amax(0)
        s = scale(shared, shared_by_source(d, fold, joined, "max")[None], settings.alpha)
        apply(d, fold, layer, s)
        for name in fold.fed:
            largest[name] = largest[name] / s
            moments[name] = moments[name] / s / s[:, None]
    matrices = {}
    for name, (bits, group) in packings.items():
        weight, bias = layer[name]
        importance = moments[name].diagonal()
        solution = Solution(*rtn(weight, bits, group_of(weight, group), settings.clip, importance))
        dense = solution.dense(bits)
        matrices[name] = with_errors(weight, bias, solution, dense, moments[name])
        layer[name] = (dense, bias)
    for i, row in x:
        row = before_mlp(d, layer, n, row, x.angles_of(i))
        x.write(i, row + rest_of_layer(d, layer, n, row, x.angles_of(i)))
    return QuantizedLayer(
        matrices,
        changed_parts(layer, source, packings),
        activations={name: float(value.max()) for name, value in largest.items()},
    )


def _statistics(
    d: DecoderConfig, n: int, layer: Layer, x: Activations, names: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(second moments [in, in], largest magnitudes [in]) of what the matrices of a layer read."""
    hessians = {name: Hessian(layer[name][0].shape[1]) for name in names}
    largest = {name: torch.zeros(layer[name][0].shape[1]) for name in names}
    for i, row in x:
        angles = x.angles_of(i)
        middle = before_mlp(d, layer, n, row, angles)
        for name in names:
            start = row if name in ("qkv", "o") else middle
            read = input_of(d, n, layer, name, start, angles=angles)
            hessians[name].add(read)
            largest[name] = torch.maximum(largest[name], read.abs().amax((0, 1)))
    return {name: hessian.moment for name, hessian in hessians.items()}, largest


def check(weights: CanonicalWeights, bits: int, group: int, settings: QuantizeSettings) -> None:
    """Raise EdgemedError for another packing, a budget, an alpha out of range or experts."""
    if (bits, group) != PACKING or settings.budget or not 0 <= settings.alpha <= 1:
        raise EdgemedError(
            "quantize: smoothquant is int8 with one scale per output, without a budget, and alpha"
            " from 0 to 1",
            "Give bits: 8, group: -1, alpha: 0.5",
        )
    if weights.decoder.experts:
        raise EdgemedError(
            "quantize: smoothquant is not written for mixtures of experts", "Use gptq or awq"
        )


def moments(shapes: Mapping[str, tuple[int, ...]], settings: QuantizeSettings) -> int:
    """Those of all matrices; and of one its inverse and a copy."""
    return moments_at_once(shapes, list(shapes))


METHOD = LayerMethod(quantize_layer, moments, scales_inputs=True, check=check, packing=PACKING)
