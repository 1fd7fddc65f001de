"""One shared matrix in place of each layer's experts, and for every expert a small difference to
it: of low rank, or sparse.

Experts cost memory because all of them are stored and few are used; where they are alike, their
differences are cheaper to keep than they are. How much of them is lost is measured on calibration
text while the checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgemed.console import track
from edgemed.errors import EdgemedError, need
from edgemed.models.architecture import ExpertsConfig, family_of
from edgemed.models.checkpoint import Checkpoint, Writer, narrowed
from edgemed.models.torch_decoder import activate, linear, load_layer, routed
from edgemed.models.weights import CanonicalWeights
from edgemed.moe.densify import Settings as Average
from edgemed.moe.densify import copied, error_of, observed, shares_of, windows
from edgemed.quantization.gptq import Hessian

if TYPE_CHECKING:
    import torch

    from edgemed.moe.densify import Seen

RULE = (
    "W_j = S + D_j, S = sum_j share_j W_j; D_j of the given rank or density nearest to W_j - S on"
    " what expert j reads in the calibration text (in its weights, without text)"
)
DAMP = 0.01  # share of the mean added to the diagonal of the second moments


class Settings(Average, Protocol):
    """What this reads of a step's parameters."""

    rank: int | None
    density: float | None


def check(params: Settings) -> None:
    """Raise EdgemedError unless exactly one of rank and density is given, in its range."""
    if (params.rank is None) == (params.density is None):
        given = "both rank and density" if params.rank is not None else "neither rank nor density"
        raise EdgemedError(
            f"merge: experts shared_delta with {given}",
            "Give one of them, for example rank: 64 or density: 0.1",
        )
    if params.rank is not None and params.rank < 1:
        raise EdgemedError(
            f"merge: rank {params.rank} of the experts' differences", "Give 1 or more"
        )
    if params.density is not None and not 0 < params.density < 1:
        raise EdgemedError(
            f"merge: density {params.density} is not a share between 0 and 1, both excluded",
            "For example 0.1",
        )


def shared_delta(checkpoint: Checkpoint, out: Path, params: Settings) -> dict[str, Any]:
    """Write the checkpoint to `out`, a layer at a time; returns per sparse layer the experts'
    shares and, with calibration, tokens per expert and the error (as experts.dense).

    Low rank: with calibration D = U_r U_r^T (W - S), U_r the leading left vectors of (W - S) L, L
    L^T the second moment of what the expert reads: the nearest of its rank in output error (Eckart
    and Young; as SVD-LLM, Wang et al., ICLR 2025). Sparse: in each row the weights of the largest
    |W - S| sqrt(mean x^2) (Wanda's measure, Sun et al., ICLR 2024). Without calibration, the same
    in plain weights. Raises EdgemedError for a model without experts, a rank above a matrix', or
    too little text.
    """
    weights = CanonicalWeights(checkpoint)
    d = weights.decoder
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
    largest = min(
        min(weights.parts[f"layers.{d.experts.layers[0]}.experts.0.{last}"].shape)
        for last in ("up", "down")
    )
    if params.rank is not None and params.rank > largest:
        raise EdgemedError(
            f"merge: rank {params.rank} is above that of the experts' matrices, {largest}",
            f"Give at most {largest}; it saves something only well below",
        )
    config = weights.family.shared_experts(
        checkpoint.config, params.rank or 0, params.density or 0.0
    )
    if params.dtype not in (None, "source"):
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {
            "dtype": params.dtype
        }
    family = family_of(config, str(out / "config.json"))
    target = replace(
        d, experts=replace(d.experts, rank=params.rank or 0, density=params.density or 0.0)
    )
    parts = family.parts(target)
    rows = windows(weights, params)
    writer = Writer(out, config, checkpoint.path)
    found = {}
    for name in (name for name in weights.parts if not name.startswith("layers.")):
        copied(weights, writer, name, params.dtype)
    for n in track(list(range(d.layers)), "share a matrix"):
        facts = {}
        seen = None
        if rows is not None:
            rows, seen, facts = observed(weights, n, rows)
        for name in (
            name
            for name in weights.parts
            if name.startswith(f"layers.{n}.") and ".experts." not in name
        ):
            copied(weights, writer, name, params.dtype)
        if d.sparse(n):
            shares = shares_of(d, facts.get("tokens"), params.weights)
            made = load_layer(weights, n)
            moments = _moments(weights, n, seen) if seen else {}
            for name, value in _layer(weights, n, target.experts, shares, moments, params.dtype):
                part = parts[f"layers.{n}.{name}"]
                start = 0
                for module, count in zip(part.modules, part.rows or part.shape[:1], strict=True):
                    writer.add(
                        part.weight(family.prefixes[0] + module.split("|")[0]),
                        value[start : start + count].clone(),
                    )
                    start += count
                made[name] = value
            if seen:
                facts |= {"error": error_of(target, _loaded(target.experts, made), n, seen)}
            found[f"layers.{n}"] = {"shares": shares} | facts
    writer.close()
    return {"formula": RULE, "rank": params.rank, "density": params.density, "layers": found}


def _moments(weights: CanonicalWeights, n: int, seen: Seen) -> dict[str, Hessian]:
    """Second moments of what every expert's matrices read, from the tokens that chose it."""
    d = weights.decoder
    layer = load_layer(weights, n)
    found = {
        f"experts.{j}.{last}": Hessian(layer[f"experts.{j}.{last}"][0].shape[1])
        for j in range(d.experts.count)
        for last in ("up", "down")
    }
    for read, _ in seen:
        flat = read.reshape(-1, d.hidden)
        _, chosen = routed(d, layer, flat)
        for j in range(d.experts.count):
            own = flat[(chosen == j).any(-1)]
            found[f"experts.{j}.up"].add(own)
            found[f"experts.{j}.down"].add(activate(d, linear(layer, f"experts.{j}.up", own)))
    return found


def _layer(
    weights: CanonicalWeights,
    n: int,
    e: ExpertsConfig,
    shares: list[float],
    moments: dict[str, Hessian],
    dtype: str | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name within the layer, tensor as it is stored) of the shared matrices and of every expert's
    differences and biases.
    """
    torch = need("torch", "build")
    for last in ("up", "down"):
        own = [weights.matrix(f"layers.{n}.experts.{j}.{last}") for j in range(e.count)]
        key = weights.keys[f"layers.{n}.experts.0.{last}"][0]
        stored = (
            weights.checkpoint.tensors[f"{key}.weight"].dtype
            if dtype in (None, "source")
            else dtype
        )
        shared = narrowed(
            f"layers.{n}.base.{last}",
            sum(share * matrix.weight for share, matrix in zip(shares, own, strict=True)),
            stored,
        )
        yield f"base.{last}", shared
        for j, matrix in enumerate(own):
            name = f"experts.{j}.{last}"
            rest = matrix.weight - shared.float()
            hessian = moments.get(name)
            moment = hessian.moment if hessian and hessian.rows else torch.eye(rest.shape[1])
            for form, value in (
                low_rank(rest, moment, e.rank).items()
                if e.rank
                else sparse(rest, moment, e.kept(rest.shape[1])).items()
            ):
                yield (
                    f"{name}.{form}",
                    (
                        value
                        if form == "columns"
                        else narrowed(f"layers.{n}.{name}.{form}", value, stored)
                    ),
                )
            if matrix.bias is not None:
                yield f"{name}.bias", narrowed(f"layers.{n}.{name}.bias", matrix.bias, stored)


def low_rank(rest: torch.Tensor, moment: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """b [out, rank] and a [rank, in] with the least sum over inputs x of |(rest - b a) x|^2, x with
    this (damped) second moment [in, in].
    """
    torch = need("torch", "build")
    damped = moment.clone()
    damped.diagonal().add_(DAMP * float(damped.diagonal().mean()) + 1e-12)
    whitened = rest @ torch.linalg.cholesky(damped)
    left, sizes, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = left[:, :rank]
    half = sizes[:rank].clamp_min(1e-12).sqrt()
    # Both factors of a like size, so that a narrow format rounds neither away.
    scale = half / half.mean()
    return {"a": (basis / scale).T @ rest, "b": basis * scale}


def sparse(rest: torch.Tensor, moment: torch.Tensor, kept: int) -> dict[str, torch.Tensor]:
    """values [out, kept] at columns int32 [out, kept], ascending: of each row those of the largest
    |rest| sqrt(moment's diagonal).
    """
    torch = need("torch", "build")
    columns = (
        (rest.abs() * moment.diagonal().clamp_min(1e-12).sqrt())
        .topk(kept, -1)
        .indices.sort(-1)
        .values
    )
    return {"values": rest.gather(1, columns), "columns": columns.to(torch.int32)}


def _loaded(
    e: ExpertsConfig, made: dict[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """A layer as decoder.load_layer gives it, from what was written."""
    torch = need("torch", "build")
    layer = {name: value for name, value in made.items() if isinstance(value, tuple)}
    for last in ("up", "down"):
        layer[f"base.{last}"] = (made[f"base.{last}"].float(), None)
        for name in (f"experts.{j}.{last}" for j in range(e.count)):
            if e.rank:
                whole = made[f"{name}.b"].float() @ made[f"{name}.a"].float()
            else:
                whole = torch.zeros(layer[f"base.{last}"][0].shape).scatter_(
                    1, made[f"{name}.columns"].long(), made[f"{name}.values"].float()
                )
            bias = made.get(f"{name}.bias")
            layer[name] = (whole, None if bias is None else bias.float())
    return layer
