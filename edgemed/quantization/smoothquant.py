"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): activations with a few large channels are made
even before both they and the weights become int8.

Column j of a matrix is multiplied by s_j = max|x_j|^a / max|w_j|^(1-a) and its input divided by it,
which changes nothing in floats. The division goes where AWQ's goes (awq.folds), so the checkpoint
stays a plain one; the input of a plain MLP's `down` comes out of the activation alone and stays as
it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemed.errors import need
from edgemed.models.torch_decoder import linear, load_layer
from edgemed.quantization.awq import apply, folds, per_source
from edgemed.quantization.gptq import Hessian, Solution
from edgemed.quantization.grids import rtn
from edgemed.quantization.layerwise import Rounded, branches, feed, group_of, matrix_of

if TYPE_CHECKING:
    import torch

    from edgemed.models.weights import CanonicalWeights
    from edgemed.quantization.hidden_states import Activations
    from edgemed.quantization.layerwise import Own

LEAST = 1e-5  # SmoothQuant's own floor for magnitudes and scales


def scale(largest: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [in] of the paper's equation 4. largest: max |x| per column [in]; weight [out, in], all
    rows that read this input.
    """
    return (
        largest.clamp_min(LEAST) ** alpha / weight.abs().amax(0).clamp_min(LEAST) ** (1 - alpha)
    ).clamp_min(LEAST)


def smooth_layer(
    weights: CanonicalWeights, n: int, x: Activations, own: Own, clip: bool, alpha: float
) -> Rounded:
    """One layer without experts, smoothed and rounded to nearest; the hidden states x become those
    the rounded layer gives, its activations kept float.

    Rounded.activations: the largest magnitude of what each matrix reads after smoothing.
    """
    torch = need("torch", "build")
    d = weights.decoder
    layer = load_layer(weights, n)
    source = dict(layer)
    hessians = {name: Hessian(layer[name][0].shape[1]) for name in own}
    largest = {name: torch.zeros(layer[name][0].shape[1]) for name in own}
    for i, row in x:
        middle = (
            row
            if d.parallel
            else row + linear(source, "o", feed(d, n, source, "o", row, angles=x.turned(i)))
        )
        for name in own:
            read = feed(
                d, n, source, name, row if name in ("qkv", "o") else middle, angles=x.turned(i)
            )
            hessians[name].add(read)
            largest[name] = torch.maximum(largest[name], read.abs().amax((0, 1)))
    moments = {name: hessian.moment for name, hessian in hessians.items()}
    for fold in folds(d, n):
        # What one row makes must get one scale: heads that share a value row share the largest of
        # it and of the weights that read it.
        shared = per_source(d, fold, largest[fold.fed[0]], "largest")
        joined = torch.cat([layer[name][0] for name in fold.fed]).abs().amax(0)
        s = scale(shared, per_source(d, fold, joined, "largest")[None], alpha)
        apply(d, fold, layer, s)
        for name in fold.fed:
            largest[name] = largest[name] / s
            moments[name] = moments[name] / s / s[:, None]
    found = {}
    for name, (bits, group) in own.items():
        weight, bias = layer[name]
        solution = Solution(
            *rtn(weight, bits, group_of(weight, group), clip, moments[name].diagonal())
        )
        dense = solution.dense(bits)
        found[name] = matrix_of(weight, bias, solution, dense, moments[name])
        layer[name] = (dense, bias)
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
        found, changed, activations={name: float(value.max()) for name, value in largest.items()}
    )
