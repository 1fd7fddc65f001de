"""Bits and group of every matrix: one pair for all, or chosen per matrix within a budget of bytes.

A budget is spent where it helps most: each matrix is tried in every packing that the target has
kernels for, and bit_allocation.py solves the table of what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError
from edgemed.formatting import size
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.bit_allocation import Option, allocate, budget_bytes
from edgemed.quantization.gptq import solve
from edgemed.quantization.grids import GROUPS, fitting_group
from edgemed.quantization.layerwise import group_of
from edgemed.quantization.packed_checkpoint import (
    fits,
    fixed_bytes,
    layer_matrices,
    packed_bytes,
    weight_count,
)
from edgemed.quantization.sensitivity import Sensitivity, sensitivities
from edgemed.quantization.settings import QuantizeSettings

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import TokenSequence


@dataclass(frozen=True)
class Budget:
    """text: '4.5bpw' or '1.6GB'. target: the runtime, for messages. choices: (bits, group) that it
    has kernels for.
    """

    text: str
    target: str
    choices: tuple[tuple[int, int], ...]


def uniform_packings(
    weights: CanonicalWeights, bits: int, group: int | None
) -> dict[str, tuple[int, int]]:
    """Layer matrix -> (bits, group), the same bits for all. group: None for the largest that
    divides each matrix' rows.

    Raises EdgemedError where none does.
    """
    packings = {}
    for name in layer_matrices(weights):
        columns = weights.parts[name].shape[1]
        fitting = group or fitting_group(columns)
        if fitting is None:
            raise EdgemedError(
                f"'{weights.keys[name][0]}.weight': no group of {', '.join(map(str, GROUPS))}"
                f" divides a row of {columns} weights",
                "Give group: -1, one scale per row",
            )
        packings[name] = (bits, fitting)
    return packings


def packings_within(
    weights: CanonicalWeights,
    budget: Budget,
    samples: Sequence[TokenSequence],
    settings: QuantizeSettings,
    folder: Path,
) -> dict[str, Any]:
    """(bits, group) of every layer matrix within a budget, and what they are expected to cost, as
    the manifest notes it. folder: for hidden states meanwhile.

    Raises EdgemedError for a budget below the smallest, or calibration text that gives no
    invertible second moment.
    """
    names = layer_matrices(weights)
    fixed = 0
    for name in weights.parts:
        if not name.startswith("vision."):
            fixed += fixed_bytes(weights, name)
    room = budget_bytes(budget.text, weight_count(weights, names), fixed)
    sizes = {}
    for name in names:
        choices = [p for p in budget.choices if fits(weights, name, *p)]
        sizes[name] = {p: packed_bytes(weights, name, *p) for p in choices}
    smallest = sum(min(choices.values()) for choices in sizes.values())
    if smallest > room:
        per_weight = 8 * smallest / weight_count(weights, names)
        raise EdgemedError(
            f"budget {budget.text} is below the smallest this model can be quantized to for"
            f" {budget.target}: {per_weight:.2f}bpw, {size(fixed + smallest)}",
            "Give a larger budget",
        )
    options: dict[str, list[Option]] = {}
    for n, layer in sensitivities(weights, samples, folder):
        for part, sensitivity in layer.items():
            name = f"layers.{n}.{part}"
            options[name] = _options(sensitivity, sizes[name], settings)
    chosen = allocate({name: options[name] for name in names}, room)
    return {
        "packings": {name: tuple(map(int, option.name.split())) for name, option in chosen.items()},
        "expected_kl": sum(o.loss for o in chosen.values()),
        "sensitivity": {name: {o.name: o.loss for o in options[name]} for name in names},
        "bytes": fixed + sum(o.nbytes for o in chosen.values()),
    }


def _options(
    sensitivity: Sensitivity, sizes: dict[tuple[int, int], int], settings: QuantizeSettings
) -> list[Option]:
    """One matrix in every packing. sizes: (bits, group) -> bytes."""
    options = []
    for (bits, group), nbytes in sizes.items():
        solution = solve(
            sensitivity.weight,
            sensitivity.moment,
            bits,
            group_of(sensitivity.weight, group),
            settings.damp,
            settings.act_order,
            settings.clip,
        )
        loss = sensitivity.loss(solution.dense(bits))
        options.append(Option(f"{bits} {group}", loss, nbytes))
    return options
