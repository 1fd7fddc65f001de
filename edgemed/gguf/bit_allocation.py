"""llama.cpp types chosen per tensor within a budget: each matrix is tried in every type, and the
table of what that costs is solved exactly.

llama.cpp's own mixtures give more bits to the same kinds of tensors in every model; here the
model's own sensitivity decides. Tables and the output matrix keep the mixture's types and count in
the bytes.
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
from edgemed.gguf.gptq import DAMP, rounding
from edgemed.gguf.quant_types import fitting
from edgemed.gguf.tensor_map import Place
from edgemed.gguf.writer import Encoder, Tensor
from edgemed.quantization.bit_allocation import Option, allocate, bits_per_weight
from edgemed.quantization.gptq import root_of
from edgemed.quantization.sensitivity import sensitivities

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import TokenSequence
    from edgemed.models.weights import CanonicalWeights

TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Chosen:
    """types: layer matrix -> type. facts: what it is expected to cost, for the manifest."""

    types: dict[str, str]
    facts: dict[str, Any]


def choose(
    weights: CanonicalWeights,
    windows: Sequence[TokenSequence],
    places: Mapping[str, Place],
    types: Mapping[str, str],
    columns: Mapping[str, np.ndarray],
    budget: str,
    gptq: bool,
    folder: Path,
) -> Chosen:
    """A type for every matrix of the layers such that all tensors together take at most `budget`:
    '4.5bpw' (bits per weight of the whole file) or '1.6GB'.

    places: tensor -> where it comes from; types: what the mixture would give; columns: importance
    per canonical matrix; gptq: whether they will be rounded so, and not by llama.cpp's own routine;
    folder: for hidden states meanwhile. Raises EdgemedError where the budget is below the smallest
    file these types can make.
    """
    ours = {
        t: place
        for t, place in places.items()
        if place.part.startswith("layers.")
        and weights.parts[place.part].kind == "matrix"
        and t.endswith(".weight")
    }
    kinds = {
        t: list(dict.fromkeys(fitting(kind, place.shape[-1]) for kind in TYPES))
        for t, place in ours.items()
    }
    nbytes = {
        t: {
            kind: (
                Tensor(
                    t,
                    place.shape,
                    kind,
                    lambda: None,
                ).nbytes
            )
            for kind in kinds[t]
        }
        for t, place in ours.items()
    }
    fixed = sum(
        Tensor(
            t,
            place.shape,
            types[t],
            lambda: None,
        ).nbytes
        for t, place in places.items()
        if t not in ours
    )
    count = sum(int(np.prod(place.shape)) for place in places.values())
    bpw = bits_per_weight(budget)
    room = (int(bpw * count / 8) if bpw else units.size(budget, "budget")) - fixed
    smallest = sum(min(found.values()) for found in nbytes.values())
    if smallest > room:
        raise EdgemedError(
            f"budget {budget} is below the smallest GGUF of this model:"
            f" {8 * (fixed + smallest) / count:.2f}bpw, {size(fixed + smallest)}",
            "Give a larger budget",
        )
    losses = {t: dict.fromkeys(kinds[t], 0.0) for t in ours}
    with Encoder() as encoder:
        for n, found in sensitivities(weights, windows, folder):
            for t, place in ours.items():
                if not place.part.startswith(f"layers.{n}."):
                    continue
                # Experts of one layer are one tensor; so is a dense MLP written as that many equal
                # ones, which counts once.
                for part in dict.fromkeys(place.stack or (place.part,)):
                    sensitivity = found[part.removeprefix(f"layers.{n}.")]
                    weight = sensitivity.weight[place.rows].contiguous()
                    root = root_of(sensitivity.moment, DAMP) if gptq else None
                    for kind in kinds[t]:
                        losses[t][kind] += sensitivity.loss(
                            rounding(encoder, kind, weight, root, columns.get(part))[1], place.rows
                        )
    options = {
        t: [Option(kind, loss, nbytes[t][kind]) for kind, loss in losses[t].items()] for t in ours
    }
    found = allocate(options, room)
    total = fixed + sum(o.nbytes for o in found.values())
    facts = {
        "budget": budget,
        "tensor_bytes": total,
        "bits_per_weight": 8 * total / count,
        "expected_kl": sum(o.loss for o in found.values()),
        "sensitivity": {t: {o.name: o.loss for o in options[t]} for t in ours},
    }
    return Chosen({t: o.name for t, o in found.items()}, facts)
