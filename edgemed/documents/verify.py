"""What verification found out about an engine: parity with its float32 source, overall and stage by
stage. The keys are those of `edgemed verify --json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from edgemed.documents.document import LEFT_OUT, Document
from edgemed.documents.machine import Count
from edgemed.params import Doc, Range

OptionalCount = Annotated[int | None, Range(0), LEFT_OUT]


@dataclass(frozen=True, kw_only=True)
class VerifyLimits(Document):
    """What an engine had to keep."""

    max_kl: Annotated[float, Doc("nats")]
    min_top1: float
    max_logit_error: Annotated[float | None, Doc("only where the precision is float32")]


@dataclass(frozen=True, kw_only=True)
class Stage(Document):
    """Parity of one part of a vision model's engine, given the exact inputs of the source's own
    part. The last stage, end to end, uses the engine's own vision encoder throughout.
    """

    stage: Annotated[str, Doc("pixels, tower, projector, decoder, end to end")]
    error: float
    limit: float | None
    passed: bool
    how: str


@dataclass(frozen=True, kw_only=True)
class VerifyResult(Document):
    """Parity with the float32 source on the validation split. The greedy fields are missing for
    heads that do not generate.
    """

    engine: Annotated[str | None, LEFT_OUT] = None
    engine_key: Annotated[str | None, LEFT_OUT] = None
    adapter: Annotated[str | None, LEFT_OUT, Doc("the adapter in use")] = None
    prompts: Count
    reference: Annotated[str | None, LEFT_OUT, Doc("digest of the reference answers")] = None
    ran_on: Annotated[str | None, LEFT_OUT, Doc("target, or what emulated it")] = None
    witness: Annotated[
        str | None, LEFT_OUT, Doc("line of the witness of the checkpoint, as the manifest has it")
    ] = None
    positions: Count
    mean_kl: Annotated[float, Doc("KL(source || engine), nats")]
    max_kl: float
    top1: Annotated[float, Range(0, 1), Doc("share of positions with the same most likely token")]
    max_logit_error: float
    greedy_tokens: OptionalCount = None
    greedy_same: OptionalCount = None
    greedy_match_mean: Annotated[float | None, LEFT_OUT, Doc("tokens")] = None
    greedy_new: OptionalCount = None
    stages: Annotated[
        tuple[Stage, ...] | None,
        LEFT_OUT,
        Doc("of vision models; empty where no images were asked for"),
    ] = None
    limits: VerifyLimits
    passed: bool
    problems: tuple[str, ...]
    adapters: Annotated[
        Mapping[str, VerifyResult] | None, LEFT_OUT, Doc("one result per further adapter")
    ] = None
