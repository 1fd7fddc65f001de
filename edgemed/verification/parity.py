"""Does the engine say what its float32 source says? Divergence, agreement and greedy answers on
text of the validation split, and on images for a vision model.

It needs only a running engine and the reference answers that travel inside it, so the same check
runs where the engine was built and on the device. An engine that fails it is not benchmarked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from edgemed import plugins
from edgemed.artifacts import store
from edgemed.console import track
from edgemed.documents.verify import Stage, VerifyLimits, VerifyResult
from edgemed.engines.engine import Engine
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate, kl_divergence
from edgemed.inference.session import Session
from edgemed.verification.vision_parity import DecoderLimits, stages
from edgemed.verification.vision_parity import problems as stage_problems
from edgemed.verification.witness.witness import line_of


@dataclass(frozen=True)
class Limits:
    """What an engine must keep. max_kl: mean KL divergence from the source, nats; min_top1: share
    of positions with the same most likely token. Exact engines (those of a target's FP32_TOLERANCE)
    must besides give every greedy token and stay within a logit error.
    """

    max_kl: float = 0.05
    min_top1: float = 0.9


@dataclass(frozen=True)
class Agreement:
    """An engine's scores beside its source's. positions: how many were compared; mean_kl, max_kl:
    KL(source || engine) in nats; top1: share of positions with the same most likely token.
    """

    positions: int
    mean_kl: float
    max_kl: float
    top1: float
    max_logit_error: float


@dataclass(frozen=True)
class GreedyMatch:
    """How long greedy answers stay the source's, in tokens: asked for over all prompts, the same
    up to the first that differs, the mean of a prompt, and asked for per prompt.
    """

    greedy_tokens: int
    greedy_same: int
    greedy_match_mean: float
    greedy_new: int


def verify(
    engine: Engine,
    reference: Reference,
    limits: Limits,
    threads: int | None = None,
    adapter: str | None = None,
) -> VerifyResult:
    """Compare an engine with the reference answers; see VerifyResult for what is measured (stages
    only for vision models).

    adapter: one of the engine's, whose answers the reference then holds ('base': none). What lies
    in front of a vision model's decoder is then passed over, because no adapter reaches it.

    Raises EdgemedError where the reference does not belong to this engine's vocabulary, or shows no
    images to a vision model.
    """
    if reference.logits.shape[-1] != engine.width:
        raise EdgemedError(
            f"{engine.path}: the engine gives {engine.width} scores, its reference"
            f" {reference.logits.shape[-1]}",
            "Export the engine again",
        )
    images = reference.images
    if engine.vision and images is None:
        raise EdgemedError(
            f"{engine.path} is a vision model, and its reference answers say nothing about images"
            " (an earlier edgemed made them)",
            "Export the engine again",
        )
    exact = exact_error(engine)
    session = engine.open(threads, adapter)
    try:
        agreement = compare(session, reference)
        match = greedy(session, reference) if engine.head == "lm" else None
        rows: list[Stage] | None = None
        if engine.vision and images is not None:
            decoder = DecoderLimits(exact, limits.max_kl, limits.min_top1)
            rows = stages(engine, session, images, decoder, tower=not adapter)
    finally:
        session.close()
    problems = judge(engine, agreement, match, limits) + stage_problems(rows or [])
    result = VerifyResult(
        engine=engine.name,
        engine_key=engine.key,
        adapter=adapter or engine.default or None,
        prompts=len(reference.windows),
        reference=reference.digest(),
        ran_on=engine.emulation or engine.target,
        witness=line_of(store.open_manifest(engine.path).notes),
        **asdict(agreement),
        stages=None if rows is None else tuple(rows),
        limits=VerifyLimits(
            max_kl=limits.max_kl,
            min_top1=limits.min_top1,
            max_logit_error=exact,
        ),
        passed=not problems,
        problems=tuple(problems),
    )
    return replace(result, **asdict(match)) if match else result


def with_adapters(
    engine: Engine, result: VerifyResult, limits: Limits, threads: int | None = None
) -> VerifyResult:
    """A result of verify and, in its adapters, one for each further adapter against what the source
    with it answers; failed where one is.
    """
    results = {
        name: verify(engine, engine.reference(name), limits, threads, name)
        for name in engine.adapters
        if name != engine.default
    }
    if not results:
        return result
    problems = [
        f"{name}: {problem}" for name, adapted in results.items() for problem in adapted.problems
    ]
    return replace(
        result,
        adapters=results,
        problems=(*result.problems, *problems),
        passed=not problems and result.passed,
    )


def compare(session: Session, reference: Reference) -> Agreement:
    """KL(source || engine) per position in nats, top-1 agreement and logit error over the scored
    windows.
    """
    kl = []
    same = []
    error = 0.0
    for window, expected in track(
        list(zip(reference.windows, reference.logits, strict=False)), "parity"
    ):
        session.rewind(0)
        scores = session.prefill([int(t) for t in window], every=session.head == "lm")
        kl.append(kl_divergence(expected, scores))
        same.append(expected.argmax(-1) == scores.argmax(-1))
        error = max(error, float(np.abs(expected - scores).max()))
    divergences = np.concatenate(kl)
    agreements = np.concatenate(same)
    if not np.isfinite(divergences).all():
        raise EdgemedError(
            "the engine gives NaN or infinite scores", "Do not deploy it; export it again"
        )
    return Agreement(
        positions=int(divergences.size),
        mean_kl=float(divergences.mean()),
        max_kl=float(divergences.max()),
        top1=float(agreements.mean()),
        max_logit_error=error,
    )


def greedy(session: Session, reference: Reference) -> GreedyMatch:
    """How long the engine's greedy answers stay the source's, over all prompts."""
    matches = []
    new = reference.greedy.shape[1]
    for window, expected in track(
        list(zip(reference.windows, reference.greedy, strict=True)), "greedy answers"
    ):
        session.rewind(0)
        answer = list(
            generate(
                session, [int(t) for t in window[: reference.prompt]], Sampling(max_tokens=new)
            )
        )
        different = np.flatnonzero(np.array(answer) != expected)
        matches.append(int(different[0]) if different.size else new)
    return GreedyMatch(
        greedy_tokens=new * len(matches),
        greedy_same=sum(matches),
        greedy_match_mean=float(np.mean(matches)),
        greedy_new=new,
    )


def exact_error(engine: Engine) -> float | None:
    """The largest logit error allowed where the precision is float32, None for a quantized
    engine.
    """
    return plugins.load("targets", engine.target).FP32_TOLERANCE.get(engine.precision)


def judge(
    engine: Engine, agreement: Agreement, match: GreedyMatch | None, limits: Limits
) -> list[str]:
    """One sentence per limit broken."""
    problems = []
    if agreement.mean_kl > limits.max_kl:
        problems.append(f"mean KL {agreement.mean_kl:.4f} is above {limits.max_kl}")
    if agreement.top1 < limits.min_top1:
        problems.append(f"top-1 agreement {agreement.top1:.4f} is below {limits.min_top1}")
    allowed = exact_error(engine)
    if allowed is None:
        return problems
    if agreement.max_logit_error > allowed:
        problems.append(f"logit error {agreement.max_logit_error:.2e} is above {allowed}")
    if match and match.greedy_same != match.greedy_tokens:
        problems.append(
            f"{match.greedy_tokens - match.greedy_same} of {match.greedy_tokens} greedy tokens"
            " differ from float32"
        )
    return problems
