"""Quantize the matrices of a checkpoint to 2, 3, 4 or 8 bits, the same for all or mixed within a
budget, and write them in the AutoGPTQ layout.

Integers are chosen here once, so that every engine made from the result carries the very same ones.
The attention scale is folded into the weights first, because some runtimes know only the plain one
and must not need other integers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemed.artifacts import hashing, store
from edgemed.console import track
from edgemed.data.image_sets import calibration_digests
from edgemed.data.text_sets import card_names
from edgemed.errors import EdgemedError, need
from edgemed.formatting import size
from edgemed.models import bitsandbytes
from edgemed.models.checkpoint import Checkpoint, Writer, narrowed
from edgemed.models.gptq_packing import pack, stride
from edgemed.models.lora import FOLDED
from edgemed.models.torch_decoder import embed_sequences
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.bit_allocation import Option, allocate, budget_bytes
from edgemed.quantization.gptq import Solution, solve
from edgemed.quantization.hidden_states import Activations, begin
from edgemed.quantization.layer_progress import Layers
from edgemed.quantization.layerwise import (
    Rounded,
    awq_layer,
    gptq_layer,
    integers,
    own_of,
    rtn_layer,
)
from edgemed.quantization.memory_budget import spilled
from edgemed.quantization.sensitivity import sensitivities
from edgemed.quantization.smoothquant import smooth_layer

if TYPE_CHECKING:
    import torch

    from edgemed.models.torch_decoder import TokenSequence

    Windows = Sequence[TokenSequence]
    # canonical matrix -> (bits, group size, -1 for one per row)
    Packings = dict[str, tuple[int, int]]

# What a budget may choose from, (bits, group): what each target has kernels for.
CHOICES = {
    "onnx": ((2, 32), (4, 128), (4, 64), (4, 32), (8, 128)),
    "tensorrt": ((4, 128), (4, 64), (4, 32), (8, -1)),
    "gptq": ((2, 32), (3, 128), (3, 32), (4, 128), (4, 64), (4, 32), (8, 128)),
}

BNB = "bnb-"


@dataclass(frozen=True)
class Params:
    """rtn rounds to nearest and needs no text; gptq, awq and smoothquant need `calibration`: the
    name or file of a set, or of several with commas between; auto is gptq. smoothquant makes inputs
    even for engines of precision w8a8: 8 bits with group -1; alpha: how much of the inputs'
    unevenness goes into the weights. bnb-nf4 and bnb-int8 write bitsandbytes' layouts for
    transformers (text models; no text needed): nf4 in blocks of 64, int8 by rows; bits and group
    are theirs, and nothing below applies but double_quant: nf4's scales are rounded to 8 bits as
    well.

    group: inputs per scale, -1 for one scale per row. samples, length: windows of calibration
    tokens. act_order: the columns with the largest inputs first (scales stay with their original
    groups). damp: share of the mean added to the Hessian's diagonal. clip: search each scale for
    the least squared error instead of covering the largest weight (default: all but rtn, where it
    gains nothing). correction: how much of the error that rounding before it left in a matrix'
    inputs is made good by it (gptq; 0: nothing). budget: '4.5bpw' (bits per weight of the layers'
    matrices, scales included) or '1.6GB' (the whole checkpoint, vision tower and projector apart):
    bits and group are then chosen per matrix, from what `target` has. max_memory: resident bytes at
    most, such as 4GB; hidden states go to disk where they would not fit. expert_tokens: an expert
    that fewer calibration tokens reached is rounded to nearest, and listed; route_at_least: an
    expert that fewer tokens chose is calibrated on those others too whose gate for it is largest,
    until it has as many (0: only on those that chose it).
    """

    method: Literal["auto", "rtn", "gptq", "awq", "smoothquant", "bnb-nf4", "bnb-int8"]
    bits: Literal[2, 3, 4, 8] = 4
    group: Literal[32, 64, 128, -1] = 128
    calibration: str | None = None
    samples: int = 128
    length: int = 512
    act_order: bool = False
    damp: float = 0.01
    clip: bool | None = None
    alpha: float = 0.5
    correction: float = 0.5
    budget: str | None = None
    target: Literal["onnx", "tensorrt", "gptq"] = "onnx"
    max_memory: str | None = None
    expert_tokens: int = 128
    route_at_least: int = 0
    double_quant: bool = False


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the calibration text. Raises EdgemedError where a method needs one and has none, or
    the set is unknown.
    """
    if params.method.startswith(BNB):
        _check_bnb(params)
        return {}
    if params.method == "rtn" and not params.budget:
        return {}
    if not params.calibration:
        needs = "a budget" if params.budget else params.method
        raise EdgemedError(
            f"quantize: {needs} needs calibration text",
            f"Give calibration: one of {', '.join(card_names())}, or a .jsonl file",
        )
    return calibration_digests(params.calibration)


def run(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the quantized checkpoint to `out`, layer by layer; returns relative errors per matrix.
    What a killed run finished is not done again.

    Raises EdgemedError for a checkpoint that is quantized already, a group that does not divide a
    row, too little calibration text, a budget below the smallest, too little memory, or a value
    that float16 cannot hold.
    """
    from edgemed.data.image_text_windows import calibration_samples

    weights = CanonicalWeights(checkpoint, fold=True)
    if weights.quantized:
        raise EdgemedError(
            f"{checkpoint.path} is quantized already", "Quantize the checkpoint it was made from"
        )
    digests = inputs(params)
    if params.method.startswith(BNB):
        return _bitsandbytes(
            CanonicalWeights(checkpoint), out, params.method.removeprefix(BNB), params.double_quant
        )
    _check(weights, params)
    params = replace(params, clip=params.method != "rtn" if params.clip is None else params.clip)
    windows = (
        calibration_samples(weights, params.calibration, params.samples, params.length)
        if digests
        else None
    )
    on_disk = spilled(weights, windows is not None, params)
    told = {name: value for name, value in asdict(params).items() if name != "max_memory"}
    with Layers(
        out,
        hashing.digest(
            {"params": told, "inputs": checkpoint.hashes() | digests, "versions": store.versions()}
        ),
    ) as kept:
        decided = kept.once("packings", lambda: _decided(weights, windows, params, kept.folder))
        packings = {name: tuple(packing) for name, packing in decided["packings"].items()}
        _round(weights, windows, params, packings, kept, on_disk)
        _write(
            weights,
            out,
            _config(
                weights,
                params,
                packings,
                {
                    name: largest
                    for facts in kept.facts
                    for name, largest in facts["ranges"].items()
                },
            ),
            kept,
        )
        errors = {name: found for facts in kept.facts for name, found in facts["errors"].items()}
        notes = {
            "folded_attention_scale": weights.decoder != weights.unfolded,
            "errors": errors,
            "spilled": on_disk,
        }
        if params.method == "awq":
            notes |= {"awq_alpha": [facts["alpha"] for facts in kept.facts]}
        if weights.decoder.experts and params.method != "rtn":
            notes["experts"] = {
                f"layers.{n}": facts["experts"]
                for n, facts in enumerate(kept.facts)
                if facts["experts"]
            }
    if params.budget:
        notes |= decided
    return notes | {
        "bits_per_weight": _bits_per_weight(weights, packings),
        "calibration_sha256": digests.get("calibration"),
    }


def _check_bnb(params: Params) -> None:
    """Raise EdgemedError where a parameter of another method is given: it would have no effect."""
    own = (4, bitsandbytes.BLOCK) if params.method == "bnb-nf4" else (8, -1)
    if (params.bits, params.group) not in (own, (Params.bits, Params.group)):
        raise EdgemedError(
            f"quantize: {params.method} has {own[0]} bits and"
            f" {'blocks of 64' if own[1] > 0 else 'one scale per row'}",
            "Leave bits and group out",
        )
    given = next(
        (name for name in ("calibration", "budget", "max_memory") if getattr(params, name)), None
    )
    if given or (params.double_quant and params.method != "bnb-nf4"):
        raise EdgemedError(
            f"quantize: {given or 'double_quant'} has no effect with {params.method}",
            "Leave it out",
        )


def _bitsandbytes(weights: CanonicalWeights, out: Path, kind: str, double: bool) -> dict[str, Any]:
    """Write the layers' matrices in bitsandbytes' layout, all other tensors as they are stored;
    nothing is folded, so transformers' own rounding would give the same.
    """
    if weights.vision or weights.decoder.experts:
        reason = "a vision tower" if weights.vision else "experts"
        raise EdgemedError(
            f"{weights.checkpoint.path} has {reason}, which transformers would take for"
            " rounded too",
            "Use gptq, awq or rtn",
        )
    matrices = {key: name for name in _layer_matrices(weights) for key in weights.keys[name]}
    uneven = (
        next(
            (
                key
                for key, name in matrices.items()
                if weights.parts[name].shape[1] % bitsandbytes.BLOCK
            ),
            None,
        )
        if kind == "nf4"
        else None
    )
    if uneven:
        columns = weights.parts[matrices[uneven]].shape[1]
        raise EdgemedError(
            f"'{uneven}': rows of {columns} weights are no multiple of {bitsandbytes.BLOCK}, and"
            " bitsandbytes 0.50.2 expands such wrongly on a CPU",
            "Use bnb-int8, gptq or rtn",
        )
    dtypes = Counter(weights.checkpoint.tensors[f"{key}.weight"].dtype for key in matrices)
    ((dtype, _),) = dtypes.most_common(1)
    config = {
        key: value for key, value in weights.checkpoint.config.items() if key != "torch_dtype"
    }
    writer = Writer(
        out,
        config | {"dtype": dtype, "quantization_config": bitsandbytes.config(kind, double, dtype)},
        weights.checkpoint.path,
    )
    errors = {}
    held = 0
    count = 0
    for tensor in track(list(weights.checkpoint.tensors), f"quantize (bitsandbytes {kind})"):
        value = weights.checkpoint.read(tensor)
        key, _, last = tensor.rpartition(".")
        if last != "weight" or key not in matrices:
            writer.add(tensor, value)
            continue
        value = value.T.contiguous() if weights.parts[matrices[key]].conv1d else value
        made = (
            bitsandbytes.nf4(value, double) if kind == "nf4" else bitsandbytes.int8(tensor, value)
        )
        errors[key] = {
            "weight": float(
                (bitsandbytes.expand(made) - value.float()).norm() / value.float().norm()
            )
        }
        held = held + sum(t.nbytes for t in made.values())
        count = count + value.numel()
        for ending, found in made.items():
            writer.add(f"{key}.{ending}", found)
    writer.close()
    return {
        "layout": f"bitsandbytes {kind}",
        "errors": errors,
        "bits_per_weight": 8 * held / count,
        "folded_attention_scale": False,
    }


def _write(weights: CanonicalWeights, out: Path, config: Mapping[str, Any], kept: Layers) -> None:
    writer = Writer(out, config, weights.checkpoint.path)
    for name, part in weights.parts.items():
        if not name.startswith("layers.") and not (
            part.kind == "matrix" and weights.keys[name] == weights.keys["embed"]
        ):
            for tensor, value in _copied(weights, name).items():
                writer.add(tensor, value)
    for n in range(weights.decoder.layers):
        for tensor, value in kept.tensors(n).items():
            writer.add(tensor, value)
    writer.close()


def _layer_matrices(weights: CanonicalWeights) -> list[str]:
    return [
        name
        for name, part in weights.parts.items()
        if name.startswith("layers.") and part.kind == "matrix"
    ]


def _check(weights: CanonicalWeights, params: Params) -> None:
    if (
        weights.decoder.experts
        and weights.decoder.experts.has_shared_base
        and (params.method == "awq" or params.budget)
    ):
        problem = (
            f"{weights.checkpoint.path}: {'a budget' if params.budget else 'awq'} does not know"
            " experts that share a matrix"
        )
        raise EdgemedError(problem, "Use gptq or rtn, without a budget")
    if params.method == "smoothquant":
        if (params.bits, params.group, params.budget) != (
            8,
            -1,
            None,
        ) or not 0 <= params.alpha <= 1:
            raise EdgemedError(
                "quantize: smoothquant is int8 with one scale per output, without a budget, and"
                " alpha from 0 to 1",
                "Give bits: 8, group: -1, alpha: 0.5",
            )
        if weights.decoder.experts:
            raise EdgemedError(
                "quantize: smoothquant is not written for mixtures of experts", "Use gptq or awq"
            )
    if not params.budget:
        for name in _layer_matrices(weights):
            _check_fit(weights, name, params.bits, params.group)
    if params.method == "rtn" and not params.budget:
        return
    if (
        params.samples < 1
        or params.length < 1
        or params.damp <= 0
        or not 0 <= params.correction <= 1
        or params.expert_tokens < 1
        or params.route_at_least < 0
    ):
        problem = (
            "quantize: samples, length and expert_tokens must be at least 1, route_at_least not"
            " below 0, damp above 0 and correction from 0 to 1"
        )
        raise EdgemedError(problem, "For example samples: 128, length: 512, damp: 0.01")
    if params.length > weights.decoder.context:
        raise EdgemedError(
            f"quantize: length {params.length} exceeds the model's context of"
            f" {weights.decoder.context}",
            "Ask for a shorter length",
        )


def _check_fit(weights: CanonicalWeights, name: str, bits: int, group: int) -> None:
    part = weights.parts[name]
    key, *_ = weights.keys[name]
    per = stride(bits)[0]
    # Of several joined modules, the one whose rows pack worst.
    rows = max(part.rows or part.shape[:1], key=lambda r: r % per)
    columns = part.shape[1]
    if group != -1 and columns % group:
        raise EdgemedError(
            f"'{key}.weight': a group of {group} does not divide a row of {columns} weights",
            _groups(weights),
        )
    if rows % per or columns % per:
        problem = (
            f"'{key}.weight' [{rows}, {columns}] cannot be packed: {bits}-bit values go {per} to"
            f" {'a word' if stride(bits)[1] == 1 else '3 words'}"
        )
        raise EdgemedError(problem, "This model cannot be stored in the AutoGPTQ layout")


def _groups(weights: CanonicalWeights) -> str:
    columns = [weights.parts[name].shape[1] for name in _layer_matrices(weights)]
    fitting = [str(g) for g in (32, 64, 128) if all(c % g == 0 for c in columns)]
    return f"Choose group {', '.join([*fitting, '-1'])}"


def _decided(
    weights: CanonicalWeights, windows: Windows | None, params: Params, folder: Path
) -> dict[str, Any]:
    """(bits, group) of every layer matrix, and with a budget what they are expected to cost."""
    names = _layer_matrices(weights)
    if not params.budget:
        return {"packings": dict.fromkeys(names, (params.bits, params.group))}
    fixed = sum(
        _fixed_bytes(weights, name) for name in weights.parts if not name.startswith("vision.")
    )
    room = budget_bytes(
        params.budget,
        sum(weights.parts[name].shape[0] * weights.parts[name].shape[1] for name in names),
        fixed,
    )
    sizes = {
        name: {
            p: _packed_bytes(weights, name, *p)
            for p in CHOICES[params.target]
            if _fits(weights, name, *p)
        }
        for name in names
    }
    smallest = sum(min(found.values()) for found in sizes.values())
    if smallest > room:
        per_weight = (
            8
            * smallest
            / sum(weights.parts[name].shape[0] * weights.parts[name].shape[1] for name in names)
        )
        raise EdgemedError(
            f"budget {params.budget} is below the smallest this model can be quantized to for"
            f" {params.target}: {per_weight:.2f}bpw, {size(fixed + smallest)}",
            "Give a larger budget",
        )
    options: dict[str, list[Option]] = {}
    for n, found in sensitivities(weights, windows, folder):
        for part, sensitivity in found.items():
            name = f"layers.{n}.{part}"
            options[name] = []
            for (bits, group), nbytes in sizes[name].items():
                rounded = solve(
                    sensitivity.weight,
                    sensitivity.moment,
                    bits,
                    group if group != -1 else sensitivity.weight.shape[1],
                    params.damp,
                    params.act_order,
                    params.clip,
                )
                options[name].append(
                    Option(f"{bits} {group}", sensitivity.loss(rounded.dense(bits)), nbytes)
                )
    chosen = allocate({name: options[name] for name in names}, room)
    return {
        "packings": {name: tuple(map(int, option.name.split())) for name, option in chosen.items()},
        "expected_kl": sum(o.loss for o in chosen.values()),
        "sensitivity": {name: {o.name: o.loss for o in options[name]} for name in names},
        "bytes": fixed + sum(o.nbytes for o in chosen.values()),
    }


def _fits(weights: CanonicalWeights, name: str, bits: int, group: int) -> bool:
    per = stride(bits)[0]
    return weights.parts[name].shape[1] % (per if group == -1 else group) == 0 and not any(
        rows % per for rows in weights.parts[name].rows or weights.parts[name].shape[:1]
    )


def _packed_bytes(weights: CanonicalWeights, name: str, bits: int, group: int) -> int:
    """Bytes of a packed matrix: integers, scales, zeros and g_idx, as `_packed` writes them."""
    rows, columns = weights.parts[name].shape
    groups = 1 if group == -1 else columns // group
    return (rows * columns * bits + groups * rows * (16 + bits)) // 8 + 4 * columns * len(
        weights.keys[name]
    )


def _fixed_bytes(weights: CanonicalWeights, name: str) -> int:
    """Bytes of a part that is not quantized, and of a quantized one's bias: float16, a router's
    float32.
    """
    part = weights.parts[name]
    if name != "embed" and part.kind == "matrix" and weights.keys[name] == weights.keys["embed"]:
        return 0
    entries = [f"{key}.bias" for key in weights.keys[name]] + (
        []
        if name.startswith("layers.") and part.kind == "matrix"
        else [part.weight(key) for key in weights.keys[name]]
    )
    return (4 if part.kind == "router" else 2) * sum(
        math.prod(weights.checkpoint.tensors[entry].shape)
        for entry in entries
        if entry in weights.checkpoint.tensors
    )


def _bits_per_weight(weights: CanonicalWeights, packings: Packings) -> float:
    count = sum(weights.parts[name].shape[0] * weights.parts[name].shape[1] for name in packings)
    return (
        8
        * sum(_packed_bytes(weights, name, *packing) for name, packing in packings.items())
        / count
    )


def _config(
    weights: CanonicalWeights, params: Params, packings: Packings, ranges: Mapping[str, float]
) -> dict[str, Any]:
    # Scales are bound to the input's own group even with act_order, so for a reader of the file
    # desc_act is false.
    (((bits, group), _),) = Counter(packings.values()).most_common(1)
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "static_groups": params.act_order,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "true_sequential": True,
        "damp_percent": params.damp,
    }
    # As GPTQModel writes mixed checkpoints: a pattern for the module's whole name, and what differs
    # there.
    dynamic = {
        f"+:^{re.escape(key)}$": {"bits": b, "group_size": g}
        for name, (b, g) in packings.items()
        if (b, g) != (bits, group)
        for key in weights.keys[name]
    }
    if ranges:
        quantization |= {"activation_ranges": dict(ranges)}
    config = weights.family.folded(weights.checkpoint.config)
    config.pop("torch_dtype", None)
    # For an adapter of the float model, which knows of none of it.
    folded = (
        {"q": [weights.unfolded.fold_factor(n) for n in range(weights.decoder.layers)]}
        if weights.decoder != weights.unfolded
        else {}
    )
    if params.method in ("awq", "smoothquant"):
        folded |= {"inputs": True}
    if folded:
        config |= {FOLDED: folded}
    return config | {
        "dtype": "float16",
        "quantization_config": quantization | ({"dynamic": dynamic} if dynamic else {}),
    }


def _round(
    weights: CanonicalWeights,
    windows: Windows | None,
    params: Params,
    packings: Packings,
    kept: Layers,
    on_disk: bool,
) -> None:
    """Every layer that is not finished, each calibrated on what the quantized ones before it put
    out.
    """
    torch = need("torch", "build")
    d = weights.decoder
    start = kept.done
    streams: list[Activations] = []
    with torch.inference_mode():
        if params.method != "rtn":
            shape = (params.samples, params.length, d.hidden)
            angles = (
                [turned for _, turned in embed_sequences(weights, windows)] if d.rope_axes else None
            )
            corrects = params.method in ("auto", "gptq") and params.correction
            streams = [
                Activations(
                    kept.folder,
                    name,
                    shape,
                    on_disk,
                    angles,
                )
                for name in (("hidden", "exact") if corrects else ("hidden",))
            ]
            begin(weights, windows, streams, start)
        for n in track(
            range(start, d.layers),
            f"quantize ({params.method}, {params.budget or f'{params.bits} bit'})",
        ):
            _layer(weights, n, params, packings, kept, streams)


def _layer(
    weights: CanonicalWeights,
    n: int,
    params: Params,
    packings: Packings,
    kept: Layers,
    streams: Sequence[Activations],
) -> None:
    """One layer rounded and saved; of it nothing is held while the next one is worked on."""
    own = own_of(packings, n)
    x, exact = (*streams, None, None)[:2]
    if params.method == "rtn":
        rounded = rtn_layer(weights, n, own, params.clip)
    elif params.method == "smoothquant":
        rounded = smooth_layer(weights, n, x, own, params.clip, params.alpha)
    elif params.method == "awq":
        rounded = awq_layer(weights, n, x, own, params)
    else:
        rounded = gptq_layer(weights, n, x, exact, integers(own, params), params)
    for stream in streams:
        stream.commit()
    errors = {f"layers.{n}.{name}": matrix.errors for name, matrix in rounded.matrices.items()}
    ranges = {f"layers.{n}.{name}": largest for name, largest in rounded.activations.items()}
    kept.save(
        _tensors(weights, n, rounded, packings),
        {"errors": errors, "alpha": rounded.alpha, "experts": rounded.experts, "ranges": ranges},
    )


def _tensors(
    weights: CanonicalWeights, n: int, rounded: Rounded, packings: Packings
) -> dict[str, torch.Tensor]:
    """What is written of layer n: its packed matrices, and everything else as `_copied` does."""
    found = {}
    for name in (name for name in weights.parts if name.startswith(f"layers.{n}.")):
        short = name.removeprefix(f"layers.{n}.")
        if short not in rounded.matrices:
            found |= _copied(weights, name, rounded.changed.get(short))
            continue
        matrix = rounded.matrices[short]
        start = 0
        for key, rows in zip(
            weights.keys[name],
            weights.parts[name].rows or weights.parts[name].shape[:1],
            strict=True,
        ):
            own = slice(start, start + rows)
            start += rows
            # A bias that a module does not have was read as zeros; it is not written.
            bias = (
                matrix.bias[own]
                if matrix.bias is not None and f"{key}.bias" in weights.checkpoint.tensors
                else None
            )
            packed = _packed(
                Solution(matrix.solution.q[own], matrix.solution.scales[own]),
                bias,
                name,
                packings[name][0],
            )
            found |= {f"{key}.{suffix}": tensor for suffix, tensor in packed.items()}
    return found


def _copied(
    weights: CanonicalWeights,
    name: str,
    changed: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> Mapping[str, torch.Tensor]:
    """The tensors of a part in float16, a router's in float32; `changed`: its new weight and
    bias.
    """
    part = weights.parts[name]
    found = {}
    for key in weights.keys[name]:
        for tensor, value in zip(
            (part.weight(key), f"{key}.bias"), changed or (None, None), strict=True
        ):
            if tensor in weights.checkpoint.tensors:
                # A router picks between close scores: rounded, it would pick other experts.
                value = weights.checkpoint.read(tensor) if value is None else value
                found[tensor] = (
                    value
                    if part.kind == "index"
                    else narrowed(tensor, value, "float32" if part.kind == "router" else "float16")
                )
    return found


def _packed(
    solution: Solution, bias: torch.Tensor | None, name: str, bits: int
) -> dict[str, torch.Tensor]:
    """AutoGPTQ v1 tensors of one matrix: qweight int32 [in*bits/32, out], qzeros (zero - 1), scales
    float16 [groups, out], g_idx int32 [in].
    """
    torch = need("torch", "build")
    columns = solution.q.shape[1]
    groups = solution.scales.shape[1]
    zeros = torch.full((groups, solution.q.shape[0]), (1 << (bits - 1)) - 1, dtype=torch.uint8)
    found = {
        "qweight": pack(solution.q.T.contiguous(), bits, 0),
        "qzeros": pack(zeros, bits, 1),
        "scales": narrowed(f"{name} scales", solution.scales.T, "float16"),
        "g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
    }
    return found if bias is None else found | {"bias": narrowed(f"{name} bias", bias, "float16")}
