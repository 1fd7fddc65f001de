"""A quantized checkpoint in the AutoGPTQ layout: which matrices fit it, what they weigh, and what
is written.

GPTQModel, vLLM and transformers read this layout. Everything that is not a matrix of a layer is
written as float16, a router as float32.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Writer, narrowed
from edgemed.models.gptq_packing import pack, stride
from edgemed.models.lora import FOLDED
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.gptq import Solution
from edgemed.quantization.layer_progress import Layers
from edgemed.quantization.layerwise import QuantizedLayer
from edgemed.quantization.settings import Packings, QuantizeSettings


def layer_matrices(weights: CanonicalWeights) -> list[str]:
    """The canonical names of all matrices that are quantized."""
    return [
        name
        for name, part in weights.parts.items()
        if name.startswith("layers.") and part.kind == "matrix"
    ]


def weight_count(weights: CanonicalWeights, names: list[str]) -> int:
    """How many weights these matrices have together."""
    return sum(weights.parts[name].shape[0] * weights.parts[name].shape[1] for name in names)


def check_fit(weights: CanonicalWeights, name: str, bits: int, group: int) -> None:
    """Raise EdgemedError where a matrix cannot be packed with these bits and this group."""
    part = weights.parts[name]
    key, *_ = weights.keys[name]
    per, words = stride(bits)
    # Of several joined modules, the one whose rows pack worst.
    rows = max(part.rows or part.shape[:1], key=lambda r: r % per)
    columns = part.shape[1]
    if group != -1 and columns % group:
        raise EdgemedError(
            f"'{key}.weight': a group of {group} does not divide a row of {columns} weights",
            _fitting_groups(weights),
        )
    if rows % per or columns % per:
        problem = (
            f"'{key}.weight' [{rows}, {columns}] cannot be packed: {bits}-bit values go {per} to"
            f" {'a word' if words == 1 else '3 words'}"
        )
        raise EdgemedError(problem, "This model cannot be stored in the AutoGPTQ layout")


def _fitting_groups(weights: CanonicalWeights) -> str:
    columns = [weights.parts[name].shape[1] for name in layer_matrices(weights)]
    fitting = [str(g) for g in (32, 64, 128) if all(c % g == 0 for c in columns)]
    return f"Choose group {', '.join([*fitting, '-1'])}"


def fits(weights: CanonicalWeights, name: str, bits: int, group: int) -> bool:
    """Whether a matrix can be packed with these bits and this group."""
    per = stride(bits)[0]
    part = weights.parts[name]
    if part.shape[1] % (per if group == -1 else group):
        return False
    return all(rows % per == 0 for rows in part.rows or part.shape[:1])


def packed_bytes(weights: CanonicalWeights, name: str, bits: int, group: int) -> int:
    """Bytes of a packed matrix: integers, scales, zeros and g_idx."""
    rows, columns = weights.parts[name].shape
    groups = 1 if group == -1 else columns // group
    integers = rows * columns * bits
    scales_and_zeros = groups * rows * (16 + bits)
    return (integers + scales_and_zeros) // 8 + 4 * columns * len(weights.keys[name])


def fixed_bytes(weights: CanonicalWeights, name: str) -> int:
    """Bytes of a part that is not quantized, and of a quantized one's bias: float16, a router's
    float32.
    """
    part = weights.parts[name]
    if name != "embed" and part.kind == "matrix" and weights.keys[name] == weights.keys["embed"]:
        return 0
    entries = [f"{key}.bias" for key in weights.keys[name]]
    if part.kind != "matrix" or not name.startswith("layers."):
        entries += [part.weight(key) for key in weights.keys[name]]
    tensors = weights.checkpoint.tensors
    count = sum(math.prod(tensors[entry].shape) for entry in entries if entry in tensors)
    return (4 if part.kind == "router" else 2) * count


def bits_per_weight(weights: CanonicalWeights, packings: Packings) -> float:
    """Bits of the packed matrices per weight, scales, zeros and g_idx included."""
    total = sum(packed_bytes(weights, name, *packing) for name, packing in packings.items())
    return 8 * total / weight_count(weights, list(packings))


def quantized_config(
    weights: CanonicalWeights,
    settings: QuantizeSettings,
    packings: Packings,
    ranges: Mapping[str, float],
    scales_inputs: bool,
) -> dict[str, Any]:
    """config.json of the quantized checkpoint. ranges: the largest magnitude of what each matrix
    reads, {} where none was measured; scales_inputs: whether the method scaled the inputs.
    """
    # Scales are bound to the input's own group even with act_order, so for a reader of the file
    # desc_act is false.
    (((bits, group), _),) = Counter(packings.values()).most_common(1)
    quantization: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "static_groups": settings.act_order,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "true_sequential": True,
        "damp_percent": settings.damp,
    }
    if ranges:
        quantization["activation_ranges"] = dict(ranges)
    # As GPTQModel writes mixed checkpoints: a pattern for the module's whole name, and what differs
    # there.
    dynamic = {}
    for name, packing in packings.items():
        if packing == (bits, group):
            continue
        for key in weights.keys[name]:
            pattern = f"+:^{re.escape(key)}$"
            dynamic[pattern] = {"bits": packing[0], "group_size": packing[1]}
    if dynamic:
        quantization["dynamic"] = dynamic
    config = dict(weights.family.folded(weights.checkpoint.config))
    config.pop("torch_dtype", None)
    # An adapter of the float model has to be folded likewise.
    folded: dict[str, Any] = {}
    if weights.decoder != weights.unfolded:
        folded["q"] = [weights.unfolded.fold_factor(n) for n in range(weights.decoder.layers)]
    if scales_inputs:
        folded["inputs"] = True
    if folded:
        config[FOLDED] = folded
    config["dtype"] = "float16"
    config["quantization_config"] = quantization
    return config


def write_checkpoint(
    weights: CanonicalWeights, out: Path, config: Mapping[str, Any], finished: Layers
) -> None:
    """Write the finished layers and everything outside of them to `out`."""
    writer = Writer(out, config, weights.checkpoint.path)
    for name, part in weights.parts.items():
        if name.startswith("layers."):
            continue
        is_tied = part.kind == "matrix" and weights.keys[name] == weights.keys["embed"]
        if not is_tied:
            for tensor, value in _copied(weights, name, None).items():
                writer.add(tensor, value)
    for n in range(weights.decoder.layers):
        for tensor, value in finished.tensors(n).items():
            writer.add(tensor, value)
    writer.close()


def layer_tensors(
    weights: CanonicalWeights, n: int, layer: QuantizedLayer, packings: Packings
) -> dict[str, torch.Tensor]:
    """What is written of layer n: its packed matrices, and everything else as `_copied` does."""
    tensors: dict[str, torch.Tensor] = {}
    stem = f"layers.{n}."
    for name, part in weights.parts.items():
        if not name.startswith(stem):
            continue
        short = name.removeprefix(stem)
        if short not in layer.matrices:
            tensors |= _copied(weights, name, layer.changed.get(short))
            continue
        matrix = layer.matrices[short]
        start = 0
        # q, k and v are quantized as one matrix and written as modules of their own.
        for key, count in zip(weights.keys[name], part.rows or part.shape[:1], strict=True):
            rows = slice(start, start + count)
            start += count
            bias = None
            # A bias that a module does not have was read as zeros; it is not written.
            if matrix.bias is not None and f"{key}.bias" in weights.checkpoint.tensors:
                bias = matrix.bias[rows]
            solution = Solution(matrix.solution.q[rows], matrix.solution.scales[rows])
            packed = _packed(solution, bias, name, packings[name][0])
            for suffix, tensor in packed.items():
                tensors[f"{key}.{suffix}"] = tensor
    return tensors


def _copied(
    weights: CanonicalWeights,
    name: str,
    changed: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> dict[str, torch.Tensor]:
    """The tensors of a part in float16, a router's in float32; changed: its new weight and bias."""
    part = weights.parts[name]
    dtype = "float32" if part.kind == "router" else "float16"
    tensors = {}
    for key in weights.keys[name]:
        names = (part.weight(key), f"{key}.bias")
        for tensor, value in zip(names, changed or (None, None), strict=True):
            if tensor not in weights.checkpoint.tensors:
                continue
            # A router picks between close scores: quantized, it would pick other experts.
            if value is None:
                value = weights.checkpoint.read(tensor)
            tensors[tensor] = value if part.kind == "index" else narrowed(tensor, value, dtype)
    return tensors


def _packed(
    solution: Solution, bias: torch.Tensor | None, name: str, bits: int
) -> dict[str, torch.Tensor]:
    """AutoGPTQ v1 tensors of one matrix: qweight int32 [in*bits/32, out], qzeros (zero - 1), scales
    float16 [groups, out], g_idx int32 [in].
    """
    rows, columns = solution.q.shape
    groups = solution.scales.shape[1]
    zeros = torch.full((groups, rows), (1 << (bits - 1)) - 1, dtype=torch.uint8)
    tensors = {
        "qweight": pack(solution.q.T.contiguous(), bits, 0),
        "qzeros": pack(zeros, bits, 1),
        "scales": narrowed(f"{name} scales", solution.scales.T, "float16"),
        "g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
    }
    if bias is not None:
        tensors["bias"] = narrowed(f"{name} bias", bias, "float16")
    return tensors
