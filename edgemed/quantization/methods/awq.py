"""AWQ (Lin et al. 2024, arXiv 2306.00978): inputs that are large in the mean get finer integers, by
scaling their columns up before RTN.

The inverse scale is folded into what makes the input (scale_folding.py), so the checkpoint stays a
plain one that every runtime reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig
from edgemed.models.torch_decoder import load_layer
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.expert_coverage import (
    ExpertTokens,
    expert_tokens,
    rows_of,
    too_few_tokens,
)
from edgemed.quantization.gptq import Hessian, Solution, output_error
from edgemed.quantization.grids import rtn
from edgemed.quantization.hidden_states import Activations
from edgemed.quantization.layerwise import (
    QuantizedLayer,
    QuantizedMatrix,
    before_mlp,
    changed_parts,
    group_of,
    input_of,
    rest_of_layer,
    with_errors,
)
from edgemed.quantization.memory_budget import moments_at_once
from edgemed.quantization.method import LayerMethod
from edgemed.quantization.scale_folding import Fold, apply, folds, shared_by_source
from edgemed.quantization.settings import Packings, QuantizeSettings

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer

# (name, weight [out, in], importance [in]) -> what is left of the weight after quantization
Quantized = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]

STEPS = 20


@dataclass(frozen=True)
class InputStatistics:
    """What a matrix reads. moment float32 [in, in], 2 X^T X / n; magnitude float32 [in], mean |x|;
    rows: tokens; few: too few to go by.
    """

    moment: torch.Tensor
    magnitude: torch.Tensor
    rows: int
    few: bool = False


@dataclass
class _LayerPass:
    """One layer while AWQ walks through it.

    layer: its weights, scaled and quantized as the walk goes on. source: the float weights.
    """

    d: DecoderConfig
    n: int
    layer: Layer
    source: Layer
    x: Activations
    packings: Packings
    settings: QuantizeSettings
    experts: ExpertTokens | None = None
    matrices: dict[str, QuantizedMatrix] = field(default_factory=dict)

    def halves(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(number of the sample, what attention and what the MLP of the float layer start from)."""
        for i, row in self.x:
            yield i, row, before_mlp(self.d, self.source, self.n, row, self.x.angles_of(i))

    def quantized(self, name: str, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """What RTN leaves of a scaled weight."""
        return self.solution(name, weight, self.settings.clip, importance).dense(
            self.packings[name][0]
        )

    def solution(
        self, name: str, weight: torch.Tensor, clip: bool, importance: torch.Tensor | None
    ) -> Solution:
        bits, group = self.packings[name]
        return Solution(*rtn(weight, bits, group_of(weight, group), clip, importance))


def search(
    weights: Mapping[str, torch.Tensor],
    magnitude: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    quantized: Quantized,
) -> tuple[float, torch.Tensor]:
    """(alpha, scale [in]): the scale magnitude^alpha, alpha in STEPS steps from 0 to below 1, with
    the smallest summed output error of the matrices [out, in].

    magnitude: mean |input| per column; moments: second moment [in, in] of each matrix' inputs.
    alpha 0 scales nothing, so the result is never worse on the calibration inputs than without.
    """
    least = float("inf")
    best = (0.0, magnitude.new_ones(magnitude.shape))
    for step in range(STEPS):
        scale = magnitude.clamp_min(1e-4) ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for name, weight in weights.items():
            # The columns of W are multiplied by the scale, so its inputs are divided by it.
            importance = moments[name].diagonal() / scale**2
            remains = quantized(name, weight * scale, importance) / scale
            error += output_error(weight, remains, moments[name])
        if error < least:
            least = error
            best = (step / STEPS, scale)
    return best


def fold_scale(
    d: DecoderConfig,
    fold: Fold,
    layer: Layer,
    inputs: dict[str, InputStatistics],
    quantized: Quantized,
) -> dict[str, float]:
    """Search and apply one fold: `layer` and `inputs` are changed. Returns {source: alpha}; {}
    where too little is known of all that it feeds.

    inputs: what each matrix reads. Experts that too few tokens reached take the scale and have no
    say in it.
    """
    voters = [name for name in fold.fed if name != "router" and not inputs[name].few]
    if not voters:
        return {}
    weights = {name: layer[name][0] for name in voters}
    moments = {name: inputs[name].moment for name in voters}
    magnitude = shared_by_source(d, fold, inputs[fold.fed[0]].magnitude)
    alpha, scale = search(weights, magnitude, moments, quantized)
    apply(d, fold, layer, scale)
    for name in fold.fed:
        inputs[name] = replace(inputs[name], moment=inputs[name].moment / scale / scale[:, None])
    return {fold.source: alpha}


def quantize_layer(
    weights: CanonicalWeights,
    n: int,
    streams: Sequence[Activations],
    packings: Packings,
    settings: QuantizeSettings,
) -> QuantizedLayer:
    """Layer n: scales searched and folded, then RTN. An expert that too few tokens reach takes part
    in no search; a scale its input has is folded into it all the same.
    """
    d = weights.decoder
    x = streams[0]
    layer = load_layer(weights, n)
    work = _LayerPass(
        d=d,
        n=n,
        layer=layer,
        source=dict(layer),
        x=x,
        packings=packings,
        settings=settings,
    )
    coverage = None
    # Every `down` of a layer with experts at once would be too much to hold: the inputs of each are
    # measured, and let go of, by themselves.
    names = [name for name in d.matrices(n) if not name.endswith("down")]
    if d.sparse(n):
        reads = (input_of(d, n, work.source, "router", middle) for _, _, middle in work.halves())
        work.experts, coverage = expert_tokens(d, work.source, reads, settings)
        names.insert(0, "router")
    inputs = _statistics(work, names)
    alpha: dict[str, float] = {}
    places = folds(d, n)
    for fold in places:
        if not fold.source.endswith("up"):
            alpha |= fold_scale(d, fold, layer, inputs, work.quantized)
    for stem in d.mlps(n):
        up = f"{stem}up"
        down = f"{stem}down"
        inputs |= _statistics(work, [down])
        for fold in places:
            if fold.source == up:
                alpha |= fold_scale(d, fold, layer, inputs, work.quantized)
        _finish(work, up, inputs.pop(up))
        _finish(work, down, inputs.pop(down))
    for name in ("qkv", "o"):
        _finish(work, name, inputs.pop(name))
    for i, row in x:
        row = before_mlp(d, layer, n, row, x.angles_of(i))
        x.write(i, row + rest_of_layer(d, layer, n, row, x.angles_of(i)))
    return QuantizedLayer(
        {name: work.matrices[name] for name in d.matrices(n)},
        changed_parts(layer, work.source, packings),
        alpha,
        coverage,
    )


def _finish(work: _LayerPass, name: str, inputs: InputStatistics) -> None:
    """Quantize a matrix whose scales are all folded; it takes its place in the layer."""
    weight, bias = work.layer[name]
    if inputs.few:
        solution = work.solution(name, weight, False, None)
    else:
        solution = work.solution(name, weight, work.settings.clip, inputs.moment.diagonal())
    dense = solution.dense(work.packings[name][0])
    moment = inputs.moment if inputs.rows else None
    work.matrices[name] = with_errors(weight, bias, solution, dense, moment)
    work.layer[name] = (dense, bias)


def _statistics(work: _LayerPass, names: list[str]) -> dict[str, InputStatistics]:
    """What matrices of the float layer read."""
    layer = work.source
    hessians = {name: Hessian(layer[name][0].shape[1]) for name in names}
    sums = {name: torch.zeros(layer[name][0].shape[1]) for name in names}
    for i, row, middle in work.halves():
        for name in names:
            start = row if name in ("qkv", "o") else middle
            rows = rows_of(work.experts, name, i)
            read = input_of(work.d, work.n, layer, name, start, rows, work.x.angles_of(i))
            hessians[name].add(read)
            sums[name] += read.abs().sum((0, 1))
    statistics = {}
    for name, hessian in hessians.items():
        statistics[name] = InputStatistics(
            moment=hessian.moment,
            magnitude=sums[name] / max(hessian.rows, 1),
            rows=hessian.rows,
            few=too_few_tokens(name, hessian.rows, work.settings),
        )
    return statistics


def check(weights: CanonicalWeights, bits: int, group: int, settings: QuantizeSettings) -> None:
    """Raise EdgemedError for experts that share a matrix."""
    if weights.decoder.experts is not None and weights.decoder.experts.has_shared_base:
        raise EdgemedError(
            f"{weights.checkpoint.path}: awq does not know experts that share a matrix",
            "Use gptq or rtn, without a budget",
        )


def moments(shapes: Mapping[str, tuple[int, ...]], settings: QuantizeSettings) -> int:
    """Those of all experts' `up` and of one `down`; and of one matrix its inverse and a copy."""
    return moments_at_once(shapes, [name for name in shapes if not name.endswith("down")])


METHOD = LayerMethod(quantize_layer, moments, scales_inputs=True, check=check)
