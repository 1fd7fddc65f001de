"""AWQ (Lin et al. 2024, arXiv 2306.00978): inputs that are large in the mean get finer integers, by
scaling their columns up before rounding.

The inverse scale goes into what makes the input (a norm's weight, the rows of v, the rows of a
gated MLP's up), so the checkpoint stays a plain one that every runtime reads; where the input comes
out of a nonlinearity alone there is nothing to fold it into, and nothing is scaled. Experts, shared
expert and router read one norm and share its scale; the router, which stays float32, is multiplied
by it too, so that it chooses as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgemed.errors import need
from edgemed.models.architecture import DecoderConfig
from edgemed.quantization.gptq import output_error

if TYPE_CHECKING:
    import torch

    from edgemed.models.torch_decoder import Layer

    # (name, weight [out, in], importance [in]) -> what is left of the weight after rounding
    Rounding = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]

STEPS = 20


@dataclass(frozen=True)
class Seen:
    """What a matrix reads. moment float32 [in, in], 2 X^T X / n; magnitude float32 [in], mean |x|;
    rows: tokens; few: too few to go by.
    """

    moment: torch.Tensor
    magnitude: torch.Tensor
    rows: int
    few: bool = False


@dataclass(frozen=True)
class Fold:
    """One place where a scale can be put. source: the norm or matrix that makes the input; start:
    the first of the matrix' rows that do, None for a norm.

    fed: the matrices that read it, and the router; all tokens reach the first of them.
    """

    source: str
    fed: tuple[str, ...]
    start: int | None = None


def folds(d: DecoderConfig, n: int) -> list[Fold]:
    """Where decoder layer n takes scales."""
    ups = (*(("router",) if d.sparse(n) else ()), *(f"{mlp}up" for mlp in d.mlps(n)))
    found = (
        [Fold("attn_norm", ("qkv", *ups))]
        if d.parallel
        else [Fold("attn_norm", ("qkv",)), Fold("mlp_norm", ups)]
    )
    found.append(Fold("qkv", ("o",), d.q_size + d.kv_size))
    return (
        [*found, *(Fold(f"{mlp}up", (f"{mlp}down",), d.ffn) for mlp in d.mlps(n))]
        if d.gated
        else found
    )


def search(
    weights: Mapping[str, torch.Tensor],
    magnitude: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    rounded: Rounding,
) -> tuple[float, torch.Tensor]:
    """(alpha, scale [in]): the scale magnitude^alpha, alpha in STEPS steps from 0 to below 1, with
    the smallest summed output error of the matrices [out, in].

    magnitude: mean |input| per column; moments: second moment [in, in] of each matrix' inputs.
    alpha 0 scales nothing, so the result is never worse on the calibration inputs than without.
    """
    best = (float("inf"), 0.0, magnitude.new_ones(magnitude.shape))
    for step in range(STEPS):
        scale = magnitude.clamp_min(1e-4) ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(
            output_error(
                weight,
                rounded(name, weight * scale, moments[name].diagonal() / scale**2) / scale,
                moments[name],
            )
            for name, weight in weights.items()
        )
        best = min(best, (error, step / STEPS, scale), key=lambda found: found[0])
    return best[1:]


def per_source(
    d: DecoderConfig, fold: Fold, magnitude: torch.Tensor, how: str = "mean"
) -> torch.Tensor:
    """Magnitudes [in] such that all inputs made by one row of the source have one value, the mean
    or the largest: heads that share a key head read the same v rows.
    """
    if fold.source != "qkv" or d.heads == d.kv_heads:
        return magnitude
    groups = magnitude.view(d.kv_heads, -1, d.head_dim)
    shared = groups.mean(1, keepdim=True) if how == "mean" else groups.amax(1, keepdim=True)
    return shared.expand(-1, d.heads // d.kv_heads, -1).reshape(-1)


def apply(d: DecoderConfig, fold: Fold, layer: Layer, scale: torch.Tensor) -> None:
    """Put a scale [in] into `layer`: the source is divided by it, the columns that read it
    multiplied. The layer computes what it did.
    """
    torch = need("torch", "build")
    weight, bias = layer[fold.source]
    rows = torch.ones(weight.shape[0])
    if fold.start is None:
        rows = scale
    elif fold.source == "qkv":
        rows[fold.start :] = scale.view(d.kv_heads, -1, d.head_dim)[:, 0].reshape(-1)
    else:
        rows[fold.start :] = scale
    layer[fold.source] = (
        weight / (rows if fold.start is None else rows[:, None]),
        None if bias is None else bias / rows,
    )
    for name in fold.fed:
        layer[name] = (layer[name][0] * scale, layer[name][1])


def scaled(
    d: DecoderConfig, fold: Fold, layer: Layer, inputs: dict[str, Seen], rounded: Rounding
) -> dict[str, float]:
    """Search and apply one fold: `layer` and `inputs` are changed. Returns {source: alpha}; {}
    where too little is known of all that it feeds.

    inputs: what each matrix reads; where they are experts' of which little is known, they take the
    scale and have no say in it.
    """
    known = [name for name in fold.fed if name != "router" and not inputs[name].few]
    if not known:
        return {}
    weights = {name: layer[name][0] for name in known}
    moments = {name: inputs[name].moment for name in known}
    alpha, scale = search(
        weights, per_source(d, fold, inputs[fold.fed[0]].magnitude), moments, rounded
    )
    apply(d, fold, layer, scale)
    for name in fold.fed:
        inputs[name] = replace(inputs[name], moment=inputs[name].moment / scale / scale[:, None])
    return {fold.source: alpha}
