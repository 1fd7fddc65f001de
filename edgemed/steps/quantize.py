"""Quantize the matrices of a checkpoint to 4 or 8 bits and write them in the AutoGPTQ layout.

Integers are chosen here once, so that every engine made from the result carries the very same ones. The attention scale is
folded into the weights first, because some runtimes know only the plain one and must not need other integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemed.checkpoint import Checkpoint, Writer, narrowed
from edgemed.console import track
from edgemed.data import calibration_windows, card_names, read_card
from edgemed.decoder import activate, attention, embed, linear, load_layer, mlp, norm, routed
from edgemed.errors import EdgemedError, need
from edgemed.gptq import Hessian, Solution, output_error, solve
from edgemed.grid import rtn
from edgemed.tokenizer import open_tokenizer
from edgemed.weights import Weights, pack

if TYPE_CHECKING:
    import torch

    from edgemed.decoder import Layer
    from edgemed.family import Decoder, Part


@dataclass(frozen=True)
class Params:
    """rtn rounds to nearest and needs no text; gptq needs `calibration`, a text set's name or file.

    group: inputs per scale, -1 for one scale per row. samples, length: windows of calibration tokens. act_order: the columns
    with the largest inputs first (scales stay with their original groups). damp: share of the mean added to the Hessian's diagonal.
    expert_tokens: an expert that fewer calibration tokens reached is rounded to nearest, and listed; route_at_least: an expert that fewer tokens chose is
    calibrated on those others too whose gate for it is largest, until it has as many (0: only on those that chose it).
    """

    method: Literal["rtn", "gptq"]
    bits: Literal[4, 8] = 4
    group: Literal[32, 64, 128, -1] = 128
    calibration: str | None = None
    samples: int = 128
    length: int = 512
    act_order: bool = False
    damp: float = 0.01
    expert_tokens: int = 128
    route_at_least: int = 0


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the calibration text. Raises EdgemedError where gptq has none, or the set is unknown."""
    if params.method == "rtn":
        return {}
    if not params.calibration:
        raise EdgemedError("quantize: gptq needs calibration text", f"Give calibration: one of {', '.join(card_names())}, or a .jsonl file")
    return {"calibration": read_card(params.calibration).digest("calibration")}


def run(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the quantized checkpoint to `out`, layer by layer; returns relative errors per matrix.

    Raises EdgemedError for a checkpoint that is quantized already, a group that does not divide a row, too little calibration
    text, or a value that float16 cannot hold.
    """
    weights = Weights(checkpoint, fold=True)
    if weights.quantization:
        raise EdgemedError(f"{checkpoint.path} is quantized already", "Quantize the checkpoint it was made from")
    digests = inputs(params)
    _check(weights, params)
    notes: dict[str, Any] = {"folded_attention_scale": weights.decoder != weights.source, "errors": {}} | ({"experts": {}} if weights.decoder.experts and params.method == "gptq" else {})
    layers = _gptq(weights, _windows(weights, params), params, notes) if params.method == "gptq" else _rtn(weights, params)
    writer = Writer(out, _config(weights, params), checkpoint.path)
    for name, part in weights.parts.items():
        if not _is_layer_matrix(name, part) and not (part.kind == "matrix" and weights.keys[name] == weights.keys["embed"]):
            _copy(weights, writer, name)
    for n, matrices in track(layers, f"quantize ({params.method}, {params.bits} bit)", total=weights.decoder.layers):
        for name, (solution, bias, errors) in matrices.items():
            part, keys = weights.parts[f"layers.{n}.{name}"], weights.keys[f"layers.{n}.{name}"]
            start = 0
            for key, rows in zip(keys, part.rows or part.shape[:1], strict=True):
                own = slice(start, start + rows)
                start += rows
                # A bias that a module does not have was read as zeros; it is not written.
                held = bias[own] if bias is not None and f"{key}.bias" in weights.checkpoint.tensors else None
                for suffix, tensor in _packed(Solution(solution.q[own], solution.scales[own]), held, f"layers.{n}.{name}", params).items():
                    writer.add(f"{key}.{suffix}", tensor)
            notes["errors"][f"layers.{n}.{name}"] = errors
    writer.close()
    return notes | {"calibration_sha256": digests.get("calibration")}


def _is_layer_matrix(name: str, part: Part) -> bool:
    return name.startswith("layers.") and part.kind == "matrix"


def _layer_matrices(weights: Weights) -> list[str]:
    return [name for name, part in weights.parts.items() if _is_layer_matrix(name, part)]


def _check(weights: Weights, params: Params) -> None:
    per = 32 // params.bits
    for name in _layer_matrices(weights):
        part, (key, *_) = weights.parts[name], weights.keys[name]
        # Of several joined modules, the one whose rows pack worst.
        rows, columns = max(part.rows or part.shape[:1], key=lambda r: r % per), part.shape[1]
        if params.group != -1 and columns % params.group:
            raise EdgemedError(f"'{key}.weight': a group of {params.group} does not divide a row of {columns} weights", _groups(weights))
        if rows % per or columns % per:
            problem = f"'{key}.weight' [{rows}, {columns}] cannot be packed: {params.bits}-bit values go {per} to a word"
            raise EdgemedError(problem, "This model cannot be stored in the AutoGPTQ layout")
    if params.method == "rtn":
        return
    if params.samples < 1 or params.length < 1 or params.damp <= 0 or params.expert_tokens < 1 or params.route_at_least < 0:
        problem = "quantize: samples, length and expert_tokens must be at least 1, route_at_least not below 0 and damp above 0"
        raise EdgemedError(problem, "For example samples: 128, length: 512, damp: 0.01")
    if params.length > weights.decoder.context:
        raise EdgemedError(f"quantize: length {params.length} exceeds the model's context of {weights.decoder.context}", "Ask for a shorter length")


def _groups(weights: Weights) -> str:
    columns = [weights.parts[name].shape[1] for name in _layer_matrices(weights)]
    fitting = [str(g) for g in (32, 64, 128) if all(c % g == 0 for c in columns)]
    return f"Choose group {', '.join([*fitting, '-1'])}"


def _config(weights: Weights, params: Params) -> dict[str, Any]:
    # Scales are bound to the input's own group even with act_order, so for a reader of the file desc_act is false.
    quantization = {
        "quant_method": "gptq", "bits": params.bits, "group_size": params.group, "desc_act": False, "static_groups": params.act_order,
        "sym": True, "lm_head": False, "checkpoint_format": "gptq", "true_sequential": True, "damp_percent": params.damp,
    }
    config = weights.family.folded(weights.checkpoint.config)
    config.pop("torch_dtype", None)
    return config | {"dtype": "float16", "quantization_config": quantization}


def _copy(weights: Weights, writer: Writer, name: str) -> None:
    part = weights.parts[name]
    for key in weights.keys[name]:
        for tensor in (part.weight(key), f"{key}.bias"):
            if tensor in weights.checkpoint.tensors:
                # A router picks between close scores: rounded, it would pick other experts.
                writer.add(tensor, narrowed(tensor, weights.checkpoint.read(tensor), "float32" if part.kind == "router" else "float16"))


def _rtn(weights: Weights, params: Params) -> Iterator[tuple[int, dict[str, Any]]]:
    for n in range(weights.decoder.layers):
        layer, found = load_layer(weights, n), {}
        for name in weights.decoder.matrices(n):
            weight, bias = layer[name]
            solution = Solution(*rtn(weight, params.bits, _group(weight, params)))
            found[name] = (solution, bias, {"weight": _weight_error(weight, solution.dense(params.bits))})
        yield n, found


def _windows(weights: Weights, params: Params) -> torch.Tensor:
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    return need("torch", "build").tensor(calibration_windows(params.calibration, tokenizer, params.samples, params.length))


def _gptq(weights: Weights, windows: torch.Tensor, params: Params, notes: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Matrices in the order they are computed, each calibrated on what the quantized ones before it put out. Writes `experts` into notes."""
    torch = need("torch", "build")
    d = weights.decoder
    with torch.inference_mode():
        x = embed(weights, windows)
        for n in range(d.layers):
            layer, found, reached = load_layer(weights, n), {}, None
            for name in d.matrices(n):
                if name.startswith("experts.") and reached is None:
                    reached, notes["experts"][f"layers.{n}"] = _reached(d, layer, x, params)
                rows = reached[int(name.split(".")[1])] if name.startswith("experts.") else None
                found[name] = _solved(d, n, layer, name, x, rows, params)
                # A parallel block's MLP reads the layer's own input: nothing is added before its end.
                if name == "o" and not d.parallel:
                    for row in x.split(1):
                        row += linear(layer, name, _feed(d, n, layer, name, row))
            for row in x.split(1):
                row += branches(d, layer, n, row)
            yield n, found


def _solved(d: Decoder, n: int, layer: Layer, name: str, x: torch.Tensor, rows: list[torch.Tensor] | None, params: Params) -> tuple[Any, ...]:
    """(solution, bias, errors) of one matrix; its rounded weight takes its place in `layer`. rows: of each window of x, the tokens that reach it (None: all)."""
    weight, bias = layer[name]
    hessian = Hessian(weight.shape[1])
    for i, window in enumerate(x.split(1)):
        hessian.add(_feed(d, n, layer, name, window, None if rows is None else rows[i]))
    if rows is not None and hessian.rows < params.expert_tokens:
        solution = Solution(*rtn(weight, params.bits, _group(weight, params)))
    else:
        try:
            solution = solve(weight, hessian.moment, params.bits, _group(weight, params), params.damp, params.act_order)
        except EdgemedError as error:
            raise EdgemedError(f"layers.{n}.{name}: {error.problem}", error.fix) from None
    rounded = solution.dense(params.bits)
    layer[name] = (rounded, bias)
    return solution, bias, {"weight": _weight_error(weight, rounded), "output": output_error(weight, rounded, hessian.moment)}


def _reached(d: Decoder, layer: Layer, x: torch.Tensor, params: Params) -> tuple[list[list[torch.Tensor]], dict[str, list[int]]]:
    """(expert -> for each window of x the tokens it is calibrated on, what the manifest says of it).

    tokens: how many chose each expert; forced: how many were added to reach route_at_least; rounded: experts below expert_tokens all the same.
    """
    torch = need("torch", "build")
    reads = torch.cat([_feed(d, 0, layer, "experts.0.up", window).reshape(-1, d.hidden) for window in x.split(1)])
    _, chosen = routed(d, layer, reads)
    uses = torch.zeros(len(reads), d.experts.count, dtype=torch.bool).scatter_(1, chosen, True)
    tokens, scores = uses.sum(0).tolist(), linear(layer, "router", reads).softmax(-1)
    for expert, count in enumerate(tokens):
        missing = min(params.route_at_least, len(reads)) - count
        if missing > 0:
            uses[scores[:, expert].masked_fill(uses[:, expert], -1).topk(missing).indices, expert] = True
    total = uses.sum(0).tolist()
    said = {"tokens": tokens, "forced": [t - c for t, c in zip(total, tokens, strict=True)], "rounded": [e for e, t in enumerate(total) if t < params.expert_tokens]}
    windows = uses.reshape(len(x), -1, d.experts.count)
    return [[window[:, expert].nonzero(as_tuple=True)[0] for window in windows] for expert in range(d.experts.count)], said


def branches(d: Decoder, layer: Layer, n: int, x: torch.Tensor) -> torch.Tensor:
    """What a finished layer still has to add to x: its MLP, and in a parallel block its attention too."""
    y = mlp(d, layer, n, norm(d, layer, "attn_norm" if d.parallel else "mlp_norm", x))
    return y + linear(layer, "o", _feed(d, n, layer, "o", x)) if d.parallel else y


def _feed(d: Decoder, n: int, layer: Layer, name: str, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The input of a matrix, from the hidden state at the start of its half of the layer (of the layer, where the block is parallel).

    x [1, tokens, hidden]; rows: which of the tokens, None for all.
    """
    if name == "qkv":
        return norm(d, layer, "attn_norm", x)
    if name == "o":
        return attention(d, n, linear(layer, "qkv", norm(d, layer, "attn_norm", x)))
    read = norm(d, layer, "attn_norm" if d.parallel else "mlp_norm", x)
    read = read if rows is None else read[:, rows]
    return read if name.endswith("up") else activate(d, linear(layer, f"{name.removesuffix('down')}up", read))


def _group(weight: torch.Tensor, params: Params) -> int:
    return weight.shape[1] if params.group == -1 else params.group


def _weight_error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((weight - rounded).norm() / weight.norm().clamp_min(1e-30))


def _packed(solution: Solution, bias: torch.Tensor | None, name: str, params: Params) -> dict[str, torch.Tensor]:
    """AutoGPTQ v1 tensors of one matrix: qweight int32 [in*bits/32, out], qzeros (zero - 1), scales float16 [groups, out], g_idx int32 [in]."""
    torch = need("torch", "build")
    columns, groups = solution.q.shape[1], solution.scales.shape[1]
    zeros = torch.full((groups, solution.q.shape[0]), (1 << (params.bits - 1)) - 1, dtype=torch.uint8)
    found = {
        "qweight": pack(solution.q.T.contiguous(), params.bits, 0),
        "qzeros": pack(zeros, params.bits, 1),
        "scales": narrowed(f"{name} scales", solution.scales.T, "float16"),
        "g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
    }
    return found if bias is None else found | {"bias": narrowed(f"{name} bias", bias, "float16")}
