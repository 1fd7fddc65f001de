"""How much memory rounding a model layer by layer takes, counted before it is begun: what decides
whether hidden states go to disk.

A limit the user gives is a promise, so a step that would break it is refused at the start, with the
smallest limit that is enough.
"""

from __future__ import annotations

import math
from typing import Protocol

from edgemed import units
from edgemed.errors import EdgemedError
from edgemed.formatting import size
from edgemed.models.torch_decoder import layer_elements
from edgemed.models.weights import CanonicalWeights

# What libraries load and allocate when they are first used, beside the tensors.
LOADED = 64 << 20


class Settings(Protocol):
    """What this reads of a step's parameters."""

    method: str
    budget: str | None
    samples: int
    length: int
    correction: float
    act_order: bool
    max_memory: str | None


def spilled(weights: CanonicalWeights, calibrated: bool, params: Settings) -> bool:
    """Whether the hidden states go to disk. Raises EdgemedError where max_memory does not even hold
    the work on one layer. calibrated: whether there are any.
    """
    import psutil

    limit = (
        units.size(params.max_memory, "max_memory")
        if params.max_memory
        else round(0.6 * psutil.virtual_memory().available)
    )
    if not calibrated:
        return False
    work = (
        psutil.Process().memory_info().rss
        + LOADED
        + 4
        * max(
            *(held(weights, n, params) for n in range(weights.decoder.layers)),
            2 * weights.decoder.vocab * weights.decoder.hidden,
        )
    )
    if params.max_memory and work > limit:
        raise EdgemedError(
            f"max_memory {params.max_memory} is too small: work on one layer of this model takes"
            f" {size(work)}",
            f"Give at least {size(work)}",
        )
    return (
        work
        + params.samples
        * params.length
        * weights.decoder.hidden
        * 4
        * (2 if params.correction else 1)
        > limit
    )


def held(weights: CanonicalWeights, n: int, params: Settings) -> int:
    """Numbers that work on layer n holds at most, experts included: the float layer and its rounded
    copy; moments; a matrix being rounded, four times.
    """
    shapes = {
        name: weights.parts[f"layers.{n}.{name}"].shape for name in weights.decoder.matrices(n)
    }
    columns = max(shape[1] for shape in shapes.values())
    largest = max(math.prod(shape) for shape in shapes.values())
    if params.budget or params.method not in ("auto", "gptq"):
        # Moments of all matrices at once for a budget and smoothquant; for awq, those of all
        # experts' `up` and of one `down`; and of one its root and a copy.
        kept = [
            shape[1]
            for name, shape in shapes.items()
            if params.budget
            or params.method == "smoothquant"
            or (params.method == "awq" and not name.endswith("down"))
        ]
        moments = sum(c**2 for c in kept) + 3 * columns**2
    else:
        # Of one matrix: a moment that holds its root too (but not in another order), and what joins
        # its inputs with the exact ones.
        moments = max(
            (1 + params.act_order) * c**2 + (c * min(c, rows) if params.correction else 0)
            for rows, c in shapes.values()
        )
    return layer_elements(weights, n) + sum(map(math.prod, shapes.values())) + moments + 4 * largest
