"""The protocol every running engine speaks, and decoding written once on top of it.

`prefill` and `step` are the only two primitives: parity, latency and accuracy are all built on
them, so every engine is measured by the same code. `rewind` moves the write position back, which is
how the options of a question share its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgemed.errors import EdgemedError


@dataclass(frozen=True)
class ImageEmbeddings:
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

    def add(self, start: int, count: int, positions: np.ndarray | None = None) -> np.ndarray:
        """Positions [parts, count] of `count` tokens appended at sequence index `start`; positions:
        counted from 0.
        """
        after = int(self.held[:, :start].max()) + 1 if start else 0
        new = np.arange(count)[None] if positions is None else positions
        self.held[:, start : start + count] = after + new
        return self.held[:, start : start + count]


class VisionEncoder(Protocol):
    """What turns the images of a prompt into features. Every target and the source have one.

    path: of its engine or checkpoint, with the chat template; v: the model's VisionConfig, with the
    image sizes of this engine; family: the Architecture whose prompts and answers the model knows;
    parts: numbers in a rotary position. Both classes lie above this package, so they are not named
    here.
    """

    path: Path
    v: Any
    family: Any
    parts: int

    def features(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """(features float32 [n, hidden], (rows, columns) of features) of one RGB image. They are
        computed once for the same pixels.
        """
        ...

    def see(
        self, tokens: Sequence[int], images: Sequence[Any]
    ) -> tuple[list[int], ImageEmbeddings | None]:
        """(tokens with every image token repeated for its image's features, the features).

        tokens: a prompt with one image token for each image, in order. Raises EdgemedError where
        there are more or fewer, or they do not fit the context.
        """
        ...

    def close(self) -> None: ...


class TimedVisionEncoder(VisionEncoder, Protocol):
    """The vision encoder of an engine. seconds: what the last call to `see` spent on 'preprocess',
    'tower' and 'projector'.
    """

    seconds: dict[str, float]


class CarriesVision:
    """The base of every session: it carries the vision encoder of its engine.

    The encoder is opened where it is first asked for, because it takes time and memory that a text
    prompt does not need. It is closed with the session.
    """

    _open_encoder: Callable[[], VisionEncoder] | None = None
    _encoder: VisionEncoder | None = None

    def carry(self, open_encoder: Callable[[], VisionEncoder]) -> None:
        """Say how the vision encoder is opened. Sessions of text models never hear of one."""
        self._open_encoder = open_encoder

    @property
    def vision(self) -> VisionEncoder | None:
        """The vision encoder, None for a text model. Raises EdgemedError where it cannot be
        opened.
        """
        if self._encoder is None and self._open_encoder is not None:
            self._encoder = self._open_encoder()
        return self._encoder

    def close_vision(self) -> None:
        """Give back what the vision encoder holds. It is opened anew where asked for again."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None


class Session(Protocol):
    """A running engine with one sequence. Arrays returned are float32 and valid until the next
    call.

    head: 'lm', 'choice' or 'classes'; width: vocabulary size for 'lm', scores per sequence
    otherwise; vision: the encoder of its images, None for a text model (see CarriesVision, the base
    of every session). A session that runs on a GPU has device = 'cuda'; that of an engine with
    adapters has use(name), which goes on with one of them (None: the base) and forgets what was
    read with the other weights.
    """

    head: str
    width: int
    context: int
    position: int

    @property
    def vision(self) -> VisionEncoder | None: ...

    def carry(self, open_encoder: Callable[[], VisionEncoder]) -> None: ...

    def close_vision(self) -> None: ...

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        """Append tokens; scores [1, width] of the last one, or [len(tokens), width] with
        every=True.

        pictures: features that take the place of image tokens. Raises EdgemedError where the tokens
        do not fit the context, or the model reads text only.
        """
        ...

    def step(self, token: int) -> np.ndarray:
        """Append one token; scores [width]."""
        ...

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on; rewind(0) starts anew."""
        ...

    def close(self) -> None: ...


class AdapterSession(Session, Protocol):
    """The session of an engine that carries LoRA adapters."""

    def use(self, adapter: str | None) -> None:
        """Go on with one of the adapters, or (None) the base. What was read with the other weights
        is forgotten.
        """
        ...


def vision_of_session(session: Session) -> VisionEncoder:
    """A session's vision encoder. Raises EdgemedError where its model reads text only."""
    encoder = session.vision
    if encoder is None:
        raise EdgemedError(
            "this model reads text only", "Ask it without an image, or take a vision model"
        )
    return encoder


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


def check_image_embeddings(tokens: Sequence[int], pictures: ImageEmbeddings) -> None:
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


def embedding_ids(tokens: Sequence[int], pictures: ImageEmbeddings | None) -> np.ndarray:
    """Ids int64 [T] to look up in the embedding: 0 in an image's places, whose own id may lie
    outside the vocabulary.
    """
    ids = np.array(tokens, np.int64)
    return np.where(ids == pictures.token, 0, ids) if pictures else ids


def feature_rows(
    tokens: Sequence[int], pictures: ImageEmbeddings | None, has_vision: bool
) -> np.ndarray:
    """Which row of the features stands for each token, int64 [T]; -1 for text. Raises EdgemedError
    where they do not fit, or the engine (sees) takes none.
    """
    if pictures is None:
        return np.full(len(tokens), -1)
    if not has_vision:
        raise EdgemedError(
            "this engine reads text only", "Ask it without an image, or export a vision model"
        )
    check_image_embeddings(tokens, pictures)
    seen = np.array(tokens) == pictures.token
    return np.where(seen, np.cumsum(seen) - 1, -1)
