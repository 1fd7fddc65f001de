"""What a target tells the planner of the engines it can make: one `Choice` each, and the `Size` of
one.

The values stand in the targets themselves, so that a new target is planned by being there. Only
their form is defined here, and what several targets' sizes have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

from edgemed import plugins
from edgemed.models.architecture import DecoderConfig
from edgemed.models.parameter_count import SPARE, sizes
from edgemed.models.weights import CanonicalWeights
from edgemed.planning.roofline import Storage

# Inputs per scale of the integers that are planned for: the first that divides the model's rows.
GROUPS = (128, 64, 32)
GROUP = GROUPS[0]
# What a build holds beside the largest matrix in float32: the resident size of edgemed's own
# records (export of 2.6 billion weights within 0.77 GB).
BUILD = 450e6
# Bits of a weight, scales included, in what surrounds integer layers; see integer_bits.
AROUND_INTEGERS = {"table": 16.0, "norm": 32.0, "router": 32.0, "delta": 16.0, "index": 32.0}


@dataclass(frozen=True)
class Choice:
    """One kind of engine. params: the target's parameters that make it; bits: those a quantize step
    would quantize to first, 0 for none.

    arithmetic: what the device must be able to compute in; kv: KV cache precision -> (bytes per
    element, further parameters), the usual one first.
    """

    target: str
    precision: str
    params: Mapping[str, Any]
    storage: Storage
    arithmetic: str = "fp32"
    bits: int = 0
    kv: Mapping[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """Bytes of an engine's weights, and bits per weight (scales included) of its layer matrices and
    of its output matrix.

    copy: bytes of a second, rearranged copy a runtime keeps in memory. tower: bytes of a vision
    tower and projector, which lie in a file of their own.
    """

    total: int
    layer_bits: float
    head_bits: float
    copy: int = 0
    tower: int = 0


def targets() -> list[ModuleType]:
    """All target modules, in the order in which tables list them."""
    modules = [plugins.load("targets", name) for name in plugins.names("targets")]
    return sorted(modules, key=lambda module: module.TABLE_ORDER)


def choices() -> list[Choice]:
    """Every kind of engine that can be planned."""
    return [choice for module in targets() for choice in module.CHOICES]


def usual_cache_bytes(target: str) -> float:
    """Bytes per element of the KV cache that a target's engines have where nothing is said."""
    first = plugins.load("targets", target).CHOICES[0]
    element_bytes, _ = next(iter(first.kv.values()))
    return element_bytes


def engine_bytes(weights: CanonicalWeights, target: str, precision: str) -> Size:
    """The size of an engine of this target and precision, as edgemed writes it."""
    return plugins.load("targets", target).engine_bytes(weights, precision)


def kv_cache(d: DecoderConfig, element_bytes: int) -> int:
    """Bytes: 2 * layers * kv_heads * head_dim * context * bytes per element."""
    return d.cache_elements(d.context) * element_bytes


def group_of(weights: CanonicalWeights) -> int:
    """The largest of GROUPS that divides the rows of every layer matrix; the smallest where none
    does, which a target then refuses.
    """
    d = weights.unfolded
    rows = (d.hidden, d.ffn, d.q_size)
    for group in GROUPS:
        if not any(row % group for row in rows):
            return group
    return GROUPS[-1]


def integer_bits(name: str, part: tuple[str, int, int], bits: int, group: int = GROUP) -> float:
    """Bits of one canonical part (kind, weights, biases) in an engine with integer layers.

    Layer matrices have one float32 scale per `group` inputs, the output matrix is int8 with one per
    32. The few rows of a classification head and a vision tower stay float32, and so do biases.
    """
    kind, weight, bias = part
    if kind != "matrix":
        per_weight = AROUND_INTEGERS[kind]
    elif name.startswith("layers."):
        per_weight = bits + 32 / group
    elif name == "lm_head":
        per_weight = 8 + 32 / 32
    else:
        per_weight = 32.0
    return per_weight * weight + 32 * bias


def tied_head(weights: CanonicalWeights) -> int:
    """Weights of an output matrix that is the embedding table as well, 0 where it is not.

    A gathered table and a multiplied matrix need different formats, so most engines hold a tied
    matrix twice.
    """
    d = weights.unfolded
    if d.head == "lm" and weights.keys["lm_head"] == weights.keys["embed"]:
        return d.vocab * d.hidden
    return 0


def vision_parameters(weights: CanonicalWeights) -> int:
    """Weights and biases of the vision tower and projector that an engine has."""
    return sum(
        weight + bias
        for name, (_, weight, bias) in sizes(weights).items()
        if name.startswith("vision.") and not name.startswith(SPARE)
    )


def streamed_build_bytes(weights: CanonicalWeights) -> float:
    """Memory of a build that holds one matrix at a time in float32."""
    largest = max(weight for _, weight, _ in sizes(weights).values())
    return BUILD + 4 * largest


def params_of(choice: Choice, weights: CanonicalWeights) -> Mapping[str, Any]:
    """The target's parameters for this checkpoint: one that holds integers already is carried as it
    is. Where the usual group does not divide the model's rows, a smaller one is said.
    """
    if weights.quantization and choice.bits == weights.quantization["bits"]:
        return {}
    group = group_of(weights)
    target = plugins.load("targets", choice.target)
    grouped = choice.bits and "group" in {field.name for field in fields(target.Params)}
    if grouped and group != GROUP and (choice.bits == 4 or target.quantize_group(choice.bits) > 0):
        return {**choice.params, "group": group}
    return choice.params
