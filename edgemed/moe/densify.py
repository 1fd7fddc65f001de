"""One plain MLP in place of each mixture of experts: a dense checkpoint of the same family, which
every runtime takes.

Experts are not linear, so the MLP of averaged weights is not the average of the experts. It is an
approximation, and how far off each layer is on calibration text is measured while it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from edgemed.console import track
from edgemed.data.image_text_windows import calibration_samples
from edgemed.errors import EdgemedError
from edgemed.models.architecture import ParamSpec, family_of
from edgemed.models.checkpoint import Checkpoint, Writer, narrowed
from edgemed.models.torch_decoder import embed_sequences, linear, load_layer, mlp, routed
from edgemed.models.weights import CanonicalWeights, Dense
from edgemed.moe.settings import ExpertMergeSettings
from edgemed.quantization.layerwise import input_of

if TYPE_CHECKING:
    from edgemed.models.architecture import DecoderConfig
    from edgemed.models.torch_decoder import Layer

# What a layer's MLP reads and gives, each float32 [1, tokens, hidden], sample by sample.
MlpSamples = list[tuple[torch.Tensor, torch.Tensor]]

RULE = (
    "MLP of sum_j share_j W_j, its output times the mean of a token's gates where they are not"
    " renormalised; a shared expert stands beside it along ffn"
)


@dataclass(frozen=True)
class Observed:
    """One layer of the source on calibration text.

    hidden: the hidden states it gives, float32 [1, tokens, hidden] per sample. Of a mixture also:
    mlp: what it read and gave; tokens: how many chose each expert; gate: the mean sum of a token's
    gates.
    """

    hidden: list[torch.Tensor]
    mlp: MlpSamples = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    gate: float = 1.0

    def notes(self) -> dict[str, Any]:
        """What the manifest says of a mixture."""
        return {"tokens": self.tokens, "gate": self.gate}


@dataclass(frozen=True)
class _DenseModel:
    """The model that is written: its parts, the prefix of its tensors and their dtype."""

    parts: Mapping[str, ParamSpec]
    prefix: str
    dtype: str | None


def dense(checkpoint: Checkpoint, out: Path, settings: ExpertMergeSettings) -> dict[str, Any]:
    """Write the dense checkpoint to `out`, a layer at a time; returns, per sparse layer, the
    experts' shares and, with calibration, tokens per expert and the error.

    Shares are equal, or those of the calibration text's choices ('usage'). With a shared expert all
    MLPs become twice as wide: it and the average are computed side by side, which is exact for
    their sum, and what the other layers lack is zeros. error: |dense(x) - sparse(x)| / |sparse(x)|
    over all x the layer reads in the source, from the weights as written. Raises EdgemedError for a
    model without experts, gates to be averaged without calibration text, or too little of that.
    """
    weights = CanonicalWeights(checkpoint, sum_experts=True)
    d = weights.decoder
    if d.experts is None or weights.family.without_experts is None:
        raise EdgemedError(
            f"{checkpoint.path} has no mixtures of experts to make dense",
            "Leave the step out: the model is dense already",
        )
    if not d.experts.renormalised and not settings.calibration:
        raise EdgemedError(
            f"{checkpoint.path}: its gates do not sum to one, and their mean is known only from"
            " text",
            "Give calibration: a text set's name or file",
        )
    wide = 2 if d.experts.shared else 1
    config = with_dtype(weights.family.without_experts(checkpoint.config, wide), settings.dtype)
    family = family_of(config, str(out / "config.json"))
    target = _DenseModel(
        parts=family.parts(family.decoder(config, {})),
        prefix=family.prefixes[0],
        dtype=settings.dtype,
    )
    hidden = calibration_states(weights, settings)
    writer = Writer(out, config, checkpoint.path)
    layers = {}
    for name in weights.parts:
        if not name.startswith("layers."):
            copy_part(weights, writer, name, settings.dtype)
    for n in track(list(range(d.layers)), "average the experts"):
        observed = None
        if hidden is not None:
            observed = observe(weights, n, hidden)
            hidden = observed.hidden
        shares: list[float] = []
        if d.sparse(n):
            shares = shares_of(d, observed, settings.weights)
        gate = 1.0 if observed is None else observed.gate
        written = _write_layer(weights, writer, n, target, shares, gate)
        if d.sparse(n):
            notes: dict[str, Any] = {"shares": shares}
            if observed is not None:
                notes |= observed.notes()
                notes["error"] = error_of(replace(d, experts=None), written, n, observed.mlp)
            layers[f"layers.{n}"] = notes
    writer.close()
    return {"formula": RULE, "wider": wide, "layers": layers}


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config that names the dtype of the written weights; None or 'source' leaves it as it is."""
    result = dict(config)
    if dtype not in (None, "source"):
        result.pop("torch_dtype", None)
        result["dtype"] = dtype
    return result


def calibration_states(
    weights: CanonicalWeights, settings: ExpertMergeSettings
) -> list[torch.Tensor] | None:
    """Hidden states [1, tokens, hidden] of the calibration samples before the first layer, None
    without calibration. Raises EdgemedError for samples longer than the context.
    """
    if not settings.calibration:
        return None
    context = weights.decoder.context
    if settings.samples < 1 or not 1 <= settings.length <= context:
        raise EdgemedError(
            f"merge: samples {settings.samples} of length {settings.length} for a context of"
            f" {context}",
            "Both are at least 1, and length is at most the context",
        )
    samples = calibration_samples(weights, settings.calibration, settings.samples, settings.length)
    return [hidden for hidden, _ in embed_sequences(weights, samples)]


def observe(weights: CanonicalWeights, n: int, hidden: list[torch.Tensor]) -> Observed:
    """The source's layer n on its hidden states."""
    d = weights.decoder
    layer = load_layer(weights, n)
    after = []
    samples: MlpSamples = []
    chosen = []
    gates = []
    for row in hidden:
        middle = row + linear(layer, "o", input_of(d, n, layer, "o", row))
        read = input_of(d, n, layer, "router", row if d.parallel else middle)
        output = mlp(d, layer, n, read)
        after.append(middle + output)
        if d.sparse(n):
            samples.append((read, output))
            gate, experts = routed(d, layer, read.reshape(-1, d.hidden))
            chosen.append(experts.flatten())
            gates.append(gate.sum(-1))
    if not d.sparse(n):
        return Observed(after)
    counts = torch.bincount(torch.cat(chosen), minlength=d.mixture.count)
    return Observed(
        hidden=after,
        mlp=samples,
        tokens=counts.tolist(),
        gate=1.0 if d.mixture.renormalised else float(torch.cat(gates).mean()),
    )


def shares_of(
    d: DecoderConfig, observed: Observed | None, how: Literal["average", "usage"]
) -> list[float]:
    """The share of each expert in the average. Raises ValueError where usage is asked for and was
    not observed.
    """
    count = d.mixture.count
    if how == "average":
        return [1 / count] * count
    if observed is None:
        raise ValueError("shares by usage need calibration text")
    return [tokens / sum(observed.tokens) for tokens in observed.tokens]


def _write_layer(
    weights: CanonicalWeights,
    writer: Writer,
    n: int,
    target: _DenseModel,
    shares: list[float],
    gate: float,
) -> Layer:
    """Write layer n; returns its MLP as written, where it is not merely copied. gate: what the
    average's output is multiplied by.
    """
    d = weights.decoder
    stem = f"layers.{n}"
    replaced = set()
    # With a shared expert every MLP becomes wider, the plain ones too.
    if d.sparse(n) or d.mixture.shared:
        replaced.add(f"{stem}.router")
        for mlp_name in d.mlps(n):
            replaced |= {f"{stem}.{mlp_name}up", f"{stem}.{mlp_name}down"}
    for name in weights.parts:
        if name.startswith(f"{stem}.") and name not in replaced:
            copy_part(weights, writer, name, target.dtype)
    written: Layer = {}
    if not replaced:
        return written
    for last in ("up", "down"):
        first = f"{stem}.{d.mlps(n)[0]}{last}"
        matrix = _dense_matrix(weights, n, last, shares, gate)
        stored = stored_dtype(weights, first, target.dtype)
        weight = narrowed(first, matrix.weight, stored)
        bias = None if matrix.bias is None else narrowed(first, matrix.bias, stored)
        written[last] = (weight.float(), None if bias is None else bias.float())
        part = target.parts[f"{stem}.{last}"]
        start = 0
        for module, count in zip(part.modules, part.rows or part.shape[:1], strict=True):
            key = target.prefix + module.split("|")[0]
            rows = slice(start, start + count)
            start += count
            writer.add(part.weight(key), weight[rows].clone())
            if bias is not None:
                writer.add(f"{key}.bias", bias[rows].clone())
    return written


def stored_dtype(weights: CanonicalWeights, name: str, dtype: str | None) -> str:
    """The dtype a matrix is written in: the given one, or that of the source's own tensor."""
    if dtype is not None and dtype != "source":
        return dtype
    key = weights.keys[name][0]
    return weights.checkpoint.tensors[weights.parts[name].weight(key)].dtype


def float_matrix(weights: CanonicalWeights, name: str) -> Dense:
    """A matrix of a float checkpoint. Raises ValueError for a packed one."""
    matrix = weights.matrix(name)
    if not isinstance(matrix, Dense):
        raise ValueError(f"{name} is quantized")
    return matrix


def _dense_matrix(
    weights: CanonicalWeights, n: int, last: str, shares: list[float], gate: float
) -> Dense:
    """'up' or 'down' of the dense layer: the experts' average or the layer's own, and beside it the
    shared expert's where the model has one.
    """
    d = weights.decoder
    stem = f"layers.{n}"
    if d.sparse(n):
        matrix = _averaged(weights, n, last, shares, gate)
    else:
        matrix = float_matrix(weights, f"{stem}.{d.mlps(n)[0]}{last}")
    if not d.mixture.shared:
        return matrix
    if d.sparse(n):
        other = float_matrix(weights, f"{stem}.shared.{last}")
    else:
        bias = None if matrix.bias is None else torch.zeros_like(matrix.bias)
        other = Dense(torch.zeros_like(matrix.weight), bias)
    return _side_by_side(d, last, matrix, other)


def _averaged(
    weights: CanonicalWeights, n: int, last: str, shares: list[float], gate: float
) -> Dense:
    """One matrix of the experts' average; `gate` multiplies what 'down' gives, its bias too."""
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    for j, share in enumerate(shares):
        matrix = float_matrix(weights, f"layers.{n}.experts.{j}.{last}")
        factor = share * (gate if last == "down" else 1)
        weight = _plus(weight, factor * matrix.weight)
        if matrix.bias is not None:
            bias = _plus(bias, factor * matrix.bias)
    if weight is None:
        raise ValueError("an average of no experts")
    return Dense(weight, bias)


def _plus(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    # 0 +: a sum never holds a negative zero, however many it has.
    return 0 + value if total is None else total + value


def _side_by_side(d: DecoderConfig, last: str, a: Dense, b: Dense) -> Dense:
    """A matrix of the MLP whose output is the sum of two MLPs': theirs along ffn, gate with gate
    where there are gates. Raises ValueError where only `a` has a bias.
    """
    if a.bias is not None and b.bias is None:
        raise ValueError("one of two MLPs has biases and the other has none")
    bias = None
    if last == "down":
        if a.bias is not None and b.bias is not None:
            bias = a.bias + b.bias
        return Dense(torch.cat([a.weight, b.weight], 1), bias)
    halves = 2 if d.gated else 1
    if a.bias is not None and b.bias is not None:
        bias = _interleaved(a.bias, b.bias, halves)
    return Dense(_interleaved(a.weight, b.weight, halves), bias)


def _interleaved(a: torch.Tensor, b: torch.Tensor, halves: int) -> torch.Tensor:
    """The first part of a, the first of b, the second of a, and so on."""
    pieces = []
    for first, second in zip(a.chunk(halves), b.chunk(halves), strict=True):
        pieces += [first, second]
    return torch.cat(pieces)


def error_of(d: DecoderConfig, layer: Layer, n: int, samples: MlpSamples) -> float:
    """|new(x) - old(x)| / |old(x)| of a layer's MLP. layer: the new one; samples: what the old one
    read and gave.
    """
    wrong = sum(float((mlp(d, layer, n, read) - output).square().sum()) for read, output in samples)
    size = sum(float(output.square().sum()) for _, output in samples)
    return (wrong / max(size, 1e-30)) ** 0.5


def copy_part(weights: CanonicalWeights, writer: Writer, name: str, dtype: str | None) -> None:
    """Write a part as the source stores it, or in another dtype; a tied matrix only once."""
    part = weights.parts[name]
    tensors = weights.checkpoint.tensors
    if name != "embed" and weights.keys[name] == weights.keys["embed"]:
        return
    for key in weights.keys[name]:
        for tensor in (part.weight(key), f"{key}.bias"):
            if tensor not in tensors:
                continue
            value = weights.checkpoint.read(tensor)
            if dtype is not None and dtype != "source":
                value = narrowed(tensor, value, dtype)
            writer.add(tensor, value)
