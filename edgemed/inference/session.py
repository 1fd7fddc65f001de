"""The protocol every running engine speaks, and decoding written once on top of it.

`prefill` and `step` are the only two primitives: parity, latency and accuracy are all built on
them, so every engine is measured by the same code. `rewind` moves the write position back, which is
how the options of a question share its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgemed.errors import EdgemedError


@dataclass(frozen=True)
class Pictures:
    """The images of a prompt, as features. features float32 [n, hidden]: one for each token of the
    prompt whose id is `token`, in order.

    positions int64 [parts, T]: rotary positions of all tokens of the prompt, counted from 0; what
    follows goes on after the largest.
    """

    features: np.ndarray
    positions: np.ndarray
    token: int


class Positions:
    """Rotary positions of every token a session holds, for models whose images take less room in
    them than they have tokens.
    """

    def __init__(self, parts: int, context: int):
        self.held = np.zeros((parts, context), np.int64)

    def add(self, start: int, count: int, given: np.ndarray | None = None) -> np.ndarray:
        """Positions [parts, count] of `count` tokens appended at sequence index `start`; given:
        counted from 0.
        """
        after = int(self.held[:, :start].max()) + 1 if start else 0
        new = np.arange(count)[None] if given is None else given
        self.held[:, start : start + count] = after + new
        return self.held[:, start : start + count]


class Session(Protocol):
    """A running engine with one sequence. Arrays returned are float32 and valid until the next
    call.

    head: 'lm', 'choice' or 'classes'; width: vocabulary size for 'lm', scores per sequence
    otherwise. A session that runs on a GPU has device = 'cuda'; that of an engine with adapters has
    use(name), which goes on with one of them (None: the base) and forgets what was read with the
    other weights.
    """

    head: str
    width: int
    context: int
    position: int

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: Pictures | None = None
    ) -> np.ndarray:
        """Append tokens; scores [1, width] of the last one, or [len(tokens), width] with
        every=True.

        pictures: features that take the place of image tokens. Raises EdgemedError where the tokens
        do not fit the context, or the engine sees nothing.
        """
        ...

    def step(self, token: int) -> np.ndarray:
        """Append one token; scores [width]."""
        ...

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on; rewind(0) starts anew."""
        ...

    def close(self) -> None: ...


def check_room(session: Session, tokens: Sequence[int]) -> None:
    """Raise EdgemedError where appending the tokens is impossible."""
    if not len(tokens):
        raise EdgemedError("the prompt is empty", "Give at least one token")
    if session.position + len(tokens) > session.context:
        raise EdgemedError(
            f"the prompt is longer than the context: {session.position + len(tokens)} tokens,"
            f" {session.context} fit",
            "Shorten the prompt",
        )


def check_pictures(tokens: Sequence[int], pictures: Pictures) -> None:
    """Raise EdgemedError where a prompt has another number of image tokens than there are
    features.
    """
    places = sum(token == pictures.token for token in tokens)
    if places != len(pictures.features):
        raise EdgemedError(
            f"the prompt has room for {places} image features, the images have"
            f" {len(pictures.features)}",
            "Give as many images as the prompt has places for",
        )


def looked_up(tokens: Sequence[int], pictures: Pictures | None) -> np.ndarray:
    """Ids int64 [T] to look up in the embedding: 0 in an image's places, whose own id may lie
    outside the vocabulary.
    """
    found = np.array(tokens, np.int64)
    return np.where(found == pictures.token, 0, found) if pictures else found


def feature_rows(tokens: Sequence[int], pictures: Pictures | None, sees: bool) -> np.ndarray:
    """Which row of the features stands for each token, int64 [T]; -1 for text. Raises EdgemedError
    where they do not fit, or the engine (sees) takes none.
    """
    if pictures is None:
        return np.full(len(tokens), -1)
    if not sees:
        raise EdgemedError(
            "this engine reads text only", "Ask it without an image, or export a model that sees"
        )
    check_pictures(tokens, pictures)
    seen = np.array(tokens) == pictures.token
    return np.where(seen, np.cumsum(seen) - 1, -1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. temperature 0 is greedy; top_k 0 and top_p 1 switch those cuts
    off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256


def generate(
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    stop: frozenset[int] = frozenset(),
    pictures: Pictures | None = None,
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
        kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order = order[:kept]
        weights = weights[:kept] / weights[:kept].sum()
    return int(random.choice(order, p=weights))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, float64."""
    scores = scores.astype(np.float64)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
