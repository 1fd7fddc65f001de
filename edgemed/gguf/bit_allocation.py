"""llama.cpp types chosen per tensor within a budget: each matrix is tried in every type, and the
table of what that costs is solved exactly.

llama.cpp's own mixtures give more bits to the same kinds of tensors in every model; here the
model's own sensitivity decides. Tables and the output matrix keep the mixture's types and count in
the bytes. Build only: no device imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed import units
from edgemed.errors import EdgemedError
from edgemed.formatting import size
from edgemed.gguf.gptq import quantize_matrix
from edgemed.gguf.quant_types import fitting
from edgemed.gguf.tensor_map import TensorSource, layer_matrices
from edgemed.gguf.writer import Encoder, tensor_bytes
from edgemed.quantization.bit_allocation import Option, allocate, bits_per_weight
from edgemed.quantization.gptq import inverse_factor_of
from edgemed.quantization.sensitivity import Sensitivity, sensitivities
from edgemed.quantization.settings import QuantizeSettings

if TYPE_CHECKING:
    from edgemed.gguf.gptq import Sample
    from edgemed.models.weights import CanonicalWeights

    # tensor -> type -> what quantizing the tensor to it is expected to cost, nats per token
    Losses = dict[str, dict[str, float]]

TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class TypeChoice:
    """types: layer matrix -> type. facts: what it is expected to cost, for the manifest."""

    types: dict[str, str]
    facts: dict[str, Any]


def choose_types(
    weights: CanonicalWeights,
    windows: Sequence[Sample],
    sources: Mapping[str, TensorSource],
    types: Mapping[str, str],
    importance: Mapping[str, np.ndarray],
    budget: str,
    gptq: bool,
    folder: Path,
) -> TypeChoice:
    """A type for every matrix of the layers such that all tensors together take at most `budget`:
    '4.5bpw' (bits per weight of the whole file) or '1.6GB'.

    windows: the calibration samples. sources: tensor -> where it comes from. types: what the
    mixture would give. importance: float32 [in] per canonical matrix, for llama.cpp's own routine.
    gptq: whether the matrices will be quantized so, and not by that routine. folder: for hidden
    states meanwhile. Raises EdgemedError where the budget is below the smallest file these types
    can make.
    """
    matrices = layer_matrices(weights, sources)
    kinds = {}
    nbytes: dict[str, dict[str, int]] = {}
    for name, source in matrices.items():
        # Where a row is too short for a type, the one that stands in may be there already.
        kinds[name] = list(dict.fromkeys(fitting(kind, source.shape[-1]) for kind in TYPES))
        nbytes[name] = {kind: tensor_bytes(source.shape, kind) for kind in kinds[name]}
    fixed = 0
    count = 0
    for name, source in sources.items():
        count += int(np.prod(source.shape))
        if name not in matrices:
            fixed += tensor_bytes(source.shape, types[name])
    bpw = bits_per_weight(budget)
    allowed = int(bpw * count / 8) if bpw else units.size(budget, "budget")
    room = allowed - fixed
    smallest = sum(min(by_type.values()) for by_type in nbytes.values())
    if smallest > room:
        raise EdgemedError(
            f"budget {budget} is below the smallest GGUF of this model:"
            f" {8 * (fixed + smallest) / count:.2f}bpw, {size(fixed + smallest)}",
            "Give a larger budget",
        )
    losses = _losses(weights, windows, matrices, kinds, importance, gptq, folder)
    options = {}
    for name, by_type in losses.items():
        options[name] = [Option(kind, loss, nbytes[name][kind]) for kind, loss in by_type.items()]
    chosen = allocate(options, room)
    total = fixed + sum(option.nbytes for option in chosen.values())
    facts = {
        "budget": budget,
        "tensor_bytes": total,
        "bits_per_weight": 8 * total / count,
        "expected_kl": sum(option.loss for option in chosen.values()),
        "sensitivity": losses,
    }
    return TypeChoice({name: option.name for name, option in chosen.items()}, facts)


def _losses(
    weights: CanonicalWeights,
    windows: Sequence[Sample],
    matrices: Mapping[str, TensorSource],
    kinds: Mapping[str, list[str]],
    importance: Mapping[str, np.ndarray],
    gptq: bool,
    folder: Path,
) -> Losses:
    """What each tensor's types cost. kinds: tensor -> the types to try."""
    losses = {name: dict.fromkeys(by_name, 0.0) for name, by_name in kinds.items()}
    with Encoder() as encoder:
        for n, layer in sensitivities(weights, windows, folder):
            start = f"layers.{n}."
            for name, source in matrices.items():
                if not source.part.startswith(start):
                    continue
                # Experts of one layer are one tensor; so is a dense MLP written as that many equal
                # ones, which counts once.
                for part in dict.fromkeys(source.parts):
                    sensitivity = layer[part.removeprefix(start)]
                    part_losses = _part_losses(
                        encoder, sensitivity, source.rows, kinds[name], importance.get(part), gptq
                    )
                    for kind, loss in part_losses.items():
                        losses[name][kind] += loss
    return losses


def _part_losses(
    encoder: Encoder,
    sensitivity: Sensitivity,
    rows: slice,
    kinds: Sequence[str],
    importance: np.ndarray | None,
    gptq: bool,
) -> dict[str, float]:
    """type -> what quantizing these rows of one matrix to it costs."""
    weight = sensitivity.weight[rows].contiguous()
    root = inverse_factor_of(sensitivity.moment, QuantizeSettings.damp) if gptq else None
    losses = {}
    for kind in kinds:
        _, quantized = quantize_matrix(encoder, kind, weight, root, importance)
        losses[kind] = sensitivity.loss(quantized, rows)
    return losses
