"""What quantization reads of a step's or a target's parameters, in one frozen value.

The quantize step and the GGUF target have parameters of their own. Both make this value of them, so
that defaults stand in one place and the methods know neither of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Canonical matrix -> (bits, group size); -1: one scale per row.
Packings = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class QuantizeSettings:
    """The parameters of one quantization.

    method: a file in methods/. clip: search each scale for the least squared error. alpha: share of
    the inputs' unevenness that smoothquant moves into the weights. damp: share of the mean added to
    the Hessian's diagonal. act_order: columns with the largest inputs first. correction: how much
    of the error in a matrix' inputs it makes good, 0 for nothing. samples, length: calibration
    samples and tokens of each. expert_tokens: tokens an expert needs to be calibrated at all.
    route_at_least: tokens an expert is given even where fewer chose it. budget, max_memory: as
    `units.size` reads them, None for no limit.
    """

    method: str = "gptq"
    clip: bool = False
    alpha: float = 0.5
    damp: float = 0.01
    act_order: bool = False
    correction: float = 0.5
    samples: int = 128
    length: int = 512
    expert_tokens: int = 128
    route_at_least: int = 0
    budget: str | None = None
    max_memory: str | None = None
