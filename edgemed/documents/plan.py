"""What a plan says of a model on a device: every kind of engine with its predicted size and speed.
The keys are those of `edgemed plan --json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from edgemed.documents.document import Document
from edgemed.params import Doc


@dataclass(frozen=True, kw_only=True)
class PlanChoice(Document):
    """One kind of engine, predicted. Sizes are in MB of 10^6 bytes, times in seconds."""

    target: str
    precision: str
    kv: Annotated[str, Doc("precision of the KV cache")]
    context: Annotated[int, Doc("tokens")]
    tower: Annotated[str, Doc("precision of the vision tower; empty without one")]
    weights_mb: float
    kv_cache_mb: float
    activations_mb: float
    vision_mb: float
    build_mb: Annotated[float, Doc("peak memory of the build on the device")]
    run_mb: Annotated[float, Doc("peak memory while it runs")]
    ttft_s: Annotated[float, Doc("time to the first token")]
    stages_s: Annotated[Mapping[str, float], Doc("part of the time to the first token -> seconds")]
    tokens_per_s: float
    answer_s: Annotated[float, Doc("time until a whole answer is there")]
    joules_per_token_at_most: float | None
    bits: Annotated[float, Doc("mean bits of a weight in a decoder layer")]
    usual_cache: bool
    fits: bool
    builds: Annotated[bool, Doc("whether the device can build it")]
    misses: Annotated[tuple[str, ...], Doc("wishes that it does not meet")]


@dataclass(frozen=True, kw_only=True)
class LeftOutChoice(Document):
    """A kind of engine that was not predicted, and why."""

    target: str
    precision: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan(Document):
    """All kinds of engine for one model on one device. front: those that no other one beats."""

    model: str
    device: str
    power_mode: str
    usable_mb: Annotated[float, Doc("memory left for an engine")]
    prompt: Annotated[int, Doc("tokens of the request, images included")]
    choices: tuple[PlanChoice, ...]
    front: tuple[PlanChoice, ...]
    recommended: PlanChoice
    recipe: Annotated[str, Doc("a recipe that makes the recommended engine")]
    left_out: tuple[LeftOutChoice, ...]
    notes: tuple[str, ...]
