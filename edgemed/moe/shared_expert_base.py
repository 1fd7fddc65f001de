"""One shared matrix in place of each layer's experts, and for every expert a small difference to
it: of low rank, or sparse.

Experts cost memory because all of them are stored and few are used; where they are alike, their
differences are cheaper to keep than they are. How much of them is lost is measured on calibration
text while the checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgemed.console import track
from edgemed.errors import EdgemedError
from edgemed.models.architecture import Architecture, DecoderConfig, ExpertsConfig, family_of
from edgemed.models.checkpoint import Checkpoint, Writer, narrowed
from edgemed.models.torch_decoder import activate, linear, load_layer, routed
from edgemed.models.weights import CanonicalWeights
from edgemed.moe.densify import (
    MlpSamples,
    Observed,
    calibration_states,
    copy_part,
    error_of,
    float_matrix,
    observe,
    shares_of,
    stored_dtype,
    with_dtype,
)
from edgemed.moe.settings import ExpertMergeSettings
from edgemed.quantization.gptq import Hessian

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer

RULE = (
    "W_j = S + D_j, S = sum_j share_j W_j; D_j of the given rank or density nearest to W_j - S on"
    " what expert j reads in the calibration text (in its weights, without text)"
)
DAMP = 0.01  # share of the mean added to the diagonal of the second moments


@dataclass(frozen=True)
class _SharedModel:
    """The model that is written: its family, its decoder and the dtype of its tensors."""

    family: Architecture
    decoder: DecoderConfig
    dtype: str | None


def shared_delta(
    checkpoint: Checkpoint, out: Path, settings: ExpertMergeSettings
) -> dict[str, Any]:
    """Write the checkpoint to `out`, a layer at a time; returns per sparse layer the experts'
    shares and, with calibration, tokens per expert and the error (as densify.dense).

    Low rank: with calibration D = U_r U_r^T (W - S), U_r the leading left vectors of (W - S) L, L
    L^T the second moment of what the expert reads: the nearest of its rank in output error (Eckart
    and Young; as SVD-LLM, Wang et al., ICLR 2025). Sparse: in each row the weights of the largest
    |W - S| sqrt(mean x^2) (Wanda's measure, Sun et al., ICLR 2024). Without calibration, the same
    in plain weights. Raises EdgemedError for a model without experts, a rank above a matrix', or
    too little text.
    """
    weights = CanonicalWeights(checkpoint)
    d = weights.decoder
    rank = settings.rank or 0
    density = settings.density or 0.0
    if d.experts is None or weights.family.shared_experts is None:
        raise EdgemedError(
            f"{checkpoint.path} has no mixtures of experts to share a matrix",
            "Leave the step out: the model is dense already",
        )
    if d.experts.has_shared_base:
        raise EdgemedError(
            f"{checkpoint.path}: its experts share a matrix already",
            "Start from the checkpoint it was made from",
        )
    _check_rank(weights, rank)
    config = with_dtype(
        weights.family.shared_experts(checkpoint.config, rank, density), settings.dtype
    )
    target = _SharedModel(
        family=family_of(config, str(out / "config.json")),
        decoder=replace(d, experts=replace(d.experts, rank=rank, density=density)),
        dtype=settings.dtype,
    )
    hidden = calibration_states(weights, settings)
    writer = Writer(out, config, checkpoint.path)
    layers = {}
    for name in weights.parts:
        if not name.startswith("layers."):
            copy_part(weights, writer, name, settings.dtype)
    for n in track(list(range(d.layers)), "share a matrix"):
        observed = None
        if hidden is not None:
            observed = observe(weights, n, hidden)
            hidden = observed.hidden
        for name in weights.parts:
            if name.startswith(f"layers.{n}.") and ".experts." not in name:
                copy_part(weights, writer, name, settings.dtype)
        if d.sparse(n):
            shares = shares_of(d, observed, settings.weights)
            notes: dict[str, Any] = {"shares": shares}
            error = _write_experts(weights, writer, n, target, shares, observed)
            if observed is not None:
                notes |= observed.notes()
                notes["error"] = error
            layers[f"layers.{n}"] = notes
    writer.close()
    return {
        "formula": RULE,
        "rank": settings.rank,
        "density": settings.density,
        "layers": layers,
    }


def _check_rank(weights: CanonicalWeights, rank: int) -> None:
    """Raise EdgemedError for a rank above that of the experts' matrices."""
    first = weights.decoder.mixture.layers[0]
    largest = min(
        *weights.parts[f"layers.{first}.experts.0.up"].shape,
        *weights.parts[f"layers.{first}.experts.0.down"].shape,
    )
    if rank > largest:
        raise EdgemedError(
            f"merge: rank {rank} is above that of the experts' matrices, {largest}",
            f"Give at most {largest}; it saves something only well below",
        )


def _write_experts(
    weights: CanonicalWeights,
    writer: Writer,
    n: int,
    target: _SharedModel,
    shares: list[float],
    observed: Observed | None,
) -> float | None:
    """Write the shared matrices and the differences of layer n; returns the error of its MLP as
    written, None without calibration text.
    """
    experts = target.decoder.mixture
    parts = target.family.parts(target.decoder)
    moments = {} if observed is None else _moments(weights, n, observed.mlp)
    written: dict[str, torch.Tensor] = {}
    for name, value in _expert_tensors(weights, n, experts, shares, moments, target.dtype):
        part = parts[f"layers.{n}.{name}"]
        start = 0
        for module, count in zip(part.modules, part.rows or part.shape[:1], strict=True):
            key = part.weight(target.family.prefixes[0] + module.split("|")[0])
            writer.add(key, value[start : start + count].clone())
            start += count
        written[name] = value
    if observed is None:
        return None
    layer = load_layer(weights, n) | _loaded(experts, written)
    return error_of(target.decoder, layer, n, observed.mlp)


def _moments(weights: CanonicalWeights, n: int, samples: MlpSamples) -> dict[str, Hessian]:
    """Second moments of what every expert's matrices read, from the tokens that chose it."""
    d = weights.decoder
    layer = load_layer(weights, n)
    moments = {}
    for j in range(d.mixture.count):
        for last in ("up", "down"):
            name = f"experts.{j}.{last}"
            moments[name] = Hessian(layer[name][0].shape[1])
    for read, _ in samples:
        flat = read.reshape(-1, d.hidden)
        _, chosen = routed(d, layer, flat)
        for j in range(d.mixture.count):
            routed_rows = flat[(chosen == j).any(-1)]
            moments[f"experts.{j}.up"].add(routed_rows)
            moments[f"experts.{j}.down"].add(
                activate(d, linear(layer, f"experts.{j}.up", routed_rows))
            )
    return moments


def _expert_tensors(
    weights: CanonicalWeights,
    n: int,
    experts: ExpertsConfig,
    shares: list[float],
    moments: dict[str, Hessian],
    dtype: str | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name within the layer, tensor as it is stored) of the shared matrices and of every expert's
    differences and biases.
    """
    for last in ("up", "down"):
        stem = f"layers.{n}"
        matrices = [
            float_matrix(weights, f"{stem}.experts.{j}.{last}") for j in range(experts.count)
        ]
        stored = stored_dtype(weights, f"{stem}.experts.0.{last}", dtype)
        average = torch.zeros_like(matrices[0].weight)
        for share, matrix in zip(shares, matrices, strict=True):
            average = average + share * matrix.weight
        base = narrowed(f"{stem}.base.{last}", average, stored)
        yield f"base.{last}", base
        for j, matrix in enumerate(matrices):
            name = f"experts.{j}.{last}"
            rest = matrix.weight - base.float()
            hessian = moments.get(name)
            moment = torch.eye(rest.shape[1])
            if hessian is not None and hessian.rows:
                moment = hessian.moment
            if experts.rank:
                difference = low_rank(rest, moment, experts.rank)
            else:
                difference = sparse(rest, moment, experts.kept_columns(rest.shape[1]))
            for form, value in difference.items():
                if form != "columns":
                    value = narrowed(f"{stem}.{name}.{form}", value, stored)
                yield f"{name}.{form}", value
            if matrix.bias is not None:
                yield f"{name}.bias", narrowed(f"{stem}.{name}.bias", matrix.bias, stored)


def low_rank(rest: torch.Tensor, moment: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """b [out, rank] and a [rank, in] with the least sum over inputs x of |(rest - b a) x|^2, x with
    this (damped) second moment [in, in].
    """
    damped = moment.clone()
    damped.diagonal().add_(DAMP * float(damped.diagonal().mean()) + 1e-12)
    # In the basis of L, with L L^T the moment, the output error is a plain squared error.
    whitened = rest @ torch.linalg.cholesky(damped)
    left, sizes, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = left[:, :rank]
    half = sizes[:rank].clamp_min(1e-12).sqrt()
    # Both factors of a like size, so that a narrow format rounds neither away.
    scale = half / half.mean()
    return {"a": (basis / scale).T @ rest, "b": basis * scale}


def sparse(rest: torch.Tensor, moment: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """values [out, kept] at columns int32 [out, kept], ascending: of each row those of the largest
    |rest| sqrt(moment's diagonal).
    """
    measure = rest.abs() * moment.diagonal().clamp_min(1e-12).sqrt()
    columns = measure.topk(count, -1).indices.sort(-1).values
    return {"values": rest.gather(1, columns), "columns": columns.to(torch.int32)}


def _loaded(experts: ExpertsConfig, written: dict[str, torch.Tensor]) -> Layer:
    """The matrices of a mixture as torch_decoder.load_layer gives them, from what was written."""
    layer: Layer = {}
    for last in ("up", "down"):
        base = written[f"base.{last}"].float()
        layer[f"base.{last}"] = (base, None)
        for j in range(experts.count):
            name = f"experts.{j}.{last}"
            if experts.rank:
                whole = written[f"{name}.b"].float() @ written[f"{name}.a"].float()
            else:
                columns = written[f"{name}.columns"].long()
                values = written[f"{name}.values"].float()
                whole = torch.zeros(base.shape).scatter_(1, columns, values)
            bias = written.get(f"{name}.bias")
            layer[name] = (whole, None if bias is None else bias.float())
    return layer
