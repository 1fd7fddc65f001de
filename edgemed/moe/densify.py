"""One plain MLP in place of each mixture of experts: a dense checkpoint of the same family, which
every runtime takes.

Experts are not linear, so the MLP of averaged weights is not the average of the experts: it is an
approximation, and how far off each layer is on calibration text is measured while it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgemed.console import track
from edgemed.errors import EdgemedError, need
from edgemed.models.architecture import ParamSpec, family_of
from edgemed.models.checkpoint import Checkpoint, Writer, narrowed
from edgemed.models.torch_decoder import embed_sequences, linear, load_layer, mlp, routed
from edgemed.models.weights import CanonicalWeights, Dense
from edgemed.quantization.layerwise import feed

if TYPE_CHECKING:
    import torch

    from edgemed.models.architecture import DecoderConfig

    # what a layer's MLP reads and gives, each float32 [1, tokens, hidden], window by window
    Seen = list[tuple[torch.Tensor, torch.Tensor]]

RULE = (
    "MLP of sum_j share_j W_j, its output times the mean of a token's gates where they are not"
    " renormalised; a shared expert stands beside it along ffn"
)


class Settings(Protocol):
    """What this reads of a step's parameters."""

    weights: str
    calibration: str | None
    samples: int
    length: int
    dtype: str | None


def dense(checkpoint: Checkpoint, out: Path, params: Settings) -> dict[str, Any]:
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
    if not d.experts.renormalised and not params.calibration:
        raise EdgemedError(
            f"{checkpoint.path}: its gates do not sum to one, and their mean is known only from"
            " text",
            "Give calibration: a text set's name or file",
        )
    wide = 2 if d.experts.shared else 1
    config = dict(weights.family.without_experts(checkpoint.config, wide))
    if params.dtype not in (None, "source"):
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {
            "dtype": params.dtype
        }
    family = family_of(config, str(out / "config.json"))
    parts = family.parts(family.decoder(config, {}))
    rows = windows(weights, params)
    writer = Writer(out, config, checkpoint.path)
    found = {}
    for name in (name for name in weights.parts if not name.startswith("layers.")):
        copied(weights, writer, name, params.dtype)
    for n in track(list(range(d.layers)), "average the experts"):
        facts = {}
        seen = None
        if rows is not None:
            rows, seen, facts = observed(weights, n, rows)
        shares = shares_of(d, facts.get("tokens"), params.weights) if d.sparse(n) else []
        made = _write_layer(
            weights,
            writer,
            n,
            (parts, family.prefixes[0]),
            (shares, facts.get("gate", 1.0)),
            params.dtype,
        )
        if d.sparse(n):
            found[f"layers.{n}"] = (
                {"shares": shares}
                | facts
                | ({"error": error_of(replace(d, experts=None), made, n, seen)} if seen else {})
            )
    writer.close()
    return {"formula": RULE, "wider": wide, "layers": found}


def windows(weights: CanonicalWeights, params: Settings) -> list[torch.Tensor] | None:
    """Hidden states [1, tokens, hidden] of the calibration windows, None without calibration."""
    if not params.calibration:
        return None
    if params.samples < 1 or not 1 <= params.length <= weights.decoder.context:
        problem = (
            f"merge: samples {params.samples} of length {params.length} for a context of"
            f" {weights.decoder.context}"
        )
        raise EdgemedError(problem, "Both are at least 1, and length is at most the context")
    from edgemed.data.image_text_windows import calibration_samples

    return [
        hidden
        for hidden, _ in embed_sequences(
            weights, calibration_samples(weights, params.calibration, params.samples, params.length)
        )
    ]


def observed(
    weights: CanonicalWeights, n: int, rows: list[torch.Tensor]
) -> tuple[list[torch.Tensor], Seen | None, dict[str, Any]]:
    """The source's layer n on its hidden states: those it gives, what a mixture there read and
    gave, how many tokens chose each expert and their mean sum of gates.
    """
    torch = need("torch", "build")
    d = weights.decoder
    layer = load_layer(weights, n)
    after = []
    seen = []
    counts = 0
    gates = []
    for row in rows:
        middle = row + linear(layer, "o", feed(d, n, layer, "o", row))
        read = feed(d, n, layer, "router", row if d.parallel else middle)
        given = mlp(d, layer, n, read)
        after.append(middle + given)
        if d.sparse(n):
            seen.append((read, given))
            gate, chosen = routed(d, layer, read.reshape(-1, d.hidden))
            counts = counts + torch.bincount(chosen.flatten(), minlength=d.experts.count)
            gates.append(gate.sum(-1))
    if not d.sparse(n):
        return after, None, {}
    return (
        after,
        seen,
        {
            "tokens": counts.tolist(),
            "gate": 1.0 if d.experts.renormalised else float(torch.cat(gates).mean()),
        },
    )


def shares_of(d: DecoderConfig, tokens: list[int] | None, how: str) -> list[float]:
    if how == "average":
        return [1 / d.experts.count] * d.experts.count
    return [count / sum(tokens) for count in tokens]


def _write_layer(
    weights: CanonicalWeights,
    writer: Writer,
    n: int,
    target: tuple[Mapping[str, ParamSpec], str],
    rule: tuple[list[float], float],
    dtype: str | None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Write layer n; returns its MLP as written, where it is not merely copied. target: the dense
    model's parts and prefix; rule: the experts' shares and what the output is multiplied by.
    """
    torch = need("torch", "build")
    d = weights.decoder
    stem = f"layers.{n}"
    made = {}
    replaced = d.sparse(n) or d.experts.shared
    mlps = (
        {f"{stem}.router", *(f"{stem}.{mlp}{last}" for mlp in d.mlps(n) for last in ("up", "down"))}
        if replaced
        else set()
    )
    for name in (
        name for name in weights.parts if name.startswith(f"{stem}.") and name not in mlps
    ):
        copied(weights, writer, name, dtype)
    for last in ("up", "down") if replaced else ():
        part = target[0][f"{stem}.{last}"]
        first = f"{stem}.{d.mlps(n)[0]}{last}"
        matrix = _averaged(weights, n, last, *rule) if d.sparse(n) else weights.matrix(first)
        if d.experts.shared:
            other = (
                weights.matrix(f"{stem}.shared.{last}")
                if d.sparse(n)
                else Dense(
                    torch.zeros_like(matrix.weight),
                    matrix.bias if matrix.bias is None else torch.zeros_like(matrix.bias),
                )
            )
            matrix = _beside(d, last, matrix, other)
        stored = (
            weights.checkpoint.tensors[weights.parts[first].weight(weights.keys[first][0])].dtype
            if dtype in (None, "source")
            else dtype
        )
        weight = narrowed(first, matrix.weight, stored)
        bias = None if matrix.bias is None else narrowed(first, matrix.bias, stored)
        made[last] = (weight.float(), None if bias is None else bias.float())
        start = 0
        for module, count in zip(part.modules, part.rows or part.shape[:1], strict=True):
            key = target[1] + module.split("|")[0]
            own = slice(start, start + count)
            start += count
            writer.add(part.weight(key), weight[own].clone())
            if bias is not None:
                writer.add(f"{key}.bias", bias[own].clone())
    return made


def _averaged(
    weights: CanonicalWeights, n: int, last: str, shares: list[float], gate: float
) -> Dense:
    """One matrix of the experts' average; `gate` multiplies what 'down' gives, its bias too."""
    weight = 0
    bias = None
    for j, share in enumerate(shares):
        matrix = weights.matrix(f"layers.{n}.experts.{j}.{last}")
        share = share * (gate if last == "down" else 1)
        weight = weight + share * matrix.weight
        bias = bias if matrix.bias is None else share * matrix.bias + (0 if bias is None else bias)
    return Dense(weight, bias)


def _beside(d: DecoderConfig, last: str, a: Dense, b: Dense) -> Dense:
    """A matrix of the MLP whose output is the sum of two MLPs': theirs along ffn, gate with gate
    where there are gates.
    """
    torch = need("torch", "build")
    if last == "down":
        return Dense(
            torch.cat([a.weight, b.weight], 1), None if a.bias is None else a.bias + b.bias
        )

    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        halves = 2 if d.gated else 1
        return torch.cat(
            [piece for pair in zip(x.chunk(halves), y.chunk(halves), strict=True) for piece in pair]
        )

    return Dense(both(a.weight, b.weight), None if a.bias is None else both(a.bias, b.bias))


def error_of(
    d: DecoderConfig, layer: dict[str, tuple[torch.Tensor, torch.Tensor | None]], n: int, seen: Seen
) -> float:
    wrong = sum(float((mlp(d, layer, n, read) - given).square().sum()) for read, given in seen)
    return (wrong / max(sum(float(given.square().sum()) for _, given in seen), 1e-30)) ** 0.5


def copied(weights: CanonicalWeights, writer: Writer, name: str, dtype: str | None) -> None:
    part = weights.parts[name]
    tensors = weights.checkpoint.tensors
    for key in (
        ()
        if name != "embed" and weights.keys[name] == weights.keys["embed"]
        else weights.keys[name]
    ):
        for tensor in (t for t in (part.weight(key), f"{key}.bias") if t in tensors):
            value = weights.checkpoint.read(tensor)
            writer.add(
                tensor, value if dtype in (None, "source") else narrowed(tensor, value, dtype)
            )
