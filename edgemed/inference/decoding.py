"""Greedy decoding, sampling and log-probabilities, written once on top of a session's two
primitives.

Every engine is measured by this code, so that a difference between engines is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.inference.session import ImageEmbeddings, Session
from edgemed.params import Doc, Range


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked."""

    temperature: Annotated[float, Range(0, 100), Doc("0 is greedy.")] = 0.0
    top_k: Annotated[int, Range(0), Doc("Likeliest tokens to pick from. 0 switches it off.")] = 0
    top_p: Annotated[
        float, Range(above=0, high=1), Doc("Share of the likeliest tokens. 1 switches it off.")
    ] = 1.0
    seed: Annotated[int, Range(0), Doc("Of the sampling.")] = 0
    max_tokens: Annotated[int, Range(1), Doc("New tokens at most.")] = 256


def generate(
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    stop: frozenset[int] = frozenset(),
    pictures: ImageEmbeddings | None = None,
) -> Iterator[int]:
    """Yield new tokens until a stop token (not yielded), max_tokens or the end of the context."""
    if session.head != "lm":
        raise EdgemedError(
            f"this engine has a '{session.head}' head and cannot generate text", "Use edgemed eval"
        )
    yield from continued(
        session,
        (session.prefill(prompt, pictures=pictures) if pictures else session.prefill(prompt))[-1],
        sampling,
        stop,
    )


def continued(
    session: Session, scores: np.ndarray, sampling: Sampling, stop: frozenset[int] = frozenset()
) -> Iterator[int]:
    """The same where the prompt has been read already; scores [vocab] are those after its last
    token.
    """
    random = np.random.default_rng(sampling.seed)
    for count in range(sampling.max_tokens):
        token = pick(scores, sampling, random)
        if token in stop:
            return
        yield token
        if session.position >= session.context or count + 1 == sampling.max_tokens:
            return
        scores = session.step(token)


def pick(scores: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """One token id from logits [vocab]: temperature, then top-k, then nucleus (Holtzman et al.
    2020).
    """
    if sampling.temperature == 0:
        return int(scores.argmax())
    scaled = scores.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if sampling.top_p < 1:
        count = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order = order[:count]
        weights = weights[:count] / weights[:count].sum()
    return int(random.choice(order, p=weights))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, float64."""
    scores = scores.astype(np.float64)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(source: np.ndarray, engine: np.ndarray) -> np.ndarray:
    """KL(source || engine) in nats, float64 [...]. source, engine: logits [..., vocab]."""
    p = log_softmax(source)
    q = log_softmax(engine)
    return (np.exp(p) * (p - q)).sum(-1)
