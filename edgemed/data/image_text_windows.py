"""Questions about images as token sequences: what a step calibrates on or a student learns from.

A sequence has its tokens, the labels that count, and the features of its images. The vision encoder
and its projector are neither quantized nor trained in these passes. So every image is encoded once,
and its features stay in memory. This module needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from edgemed.console import track
from edgemed.data.image_sets import calibration_sets, image_rows, images_album, images_of
from edgemed.data.text_sets import calibration_sequences
from edgemed.errors import EdgemedError
from edgemed.inference.session import ImageEmbeddings, Positions
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.vision.image_io import Album
from edgemed.vision.image_turn import image_turn
from edgemed.vision.torch_encoder import TorchVisionEncoder

IGNORED = -100  # transformers' label of a token that is not counted


class MultimodalBatch(NamedTuple):
    """The images of one batch of sequences.

    features: float32 [n, hidden], all features of the batch in the order of its image tokens.
    positions: rotary positions int64 [parts, rows, length]. token: the image token's id.
    """

    features: torch.Tensor
    positions: torch.Tensor
    token: int


@dataclass(frozen=True)
class ImageInputs:
    """The images of a set of sequences, encoded.

    features: float32 [n, hidden] of each sequence, for its tokens `token`, in order. positions:
    rotary positions int64 [sequences, parts, length]. They go on behind the answer that is there,
    so another answer may stand in its place.
    """

    features: tuple[np.ndarray, ...]
    positions: np.ndarray
    token: int

    def only(self, rows: Sequence[int]) -> ImageInputs:
        """Those of these sequences alone."""
        return ImageInputs(
            tuple(self.features[row] for row in rows), self.positions[list(rows)], self.token
        )

    def batch(self, rows: Sequence[int], device: str) -> MultimodalBatch:
        """The images of these sequences, on a torch device."""
        features = np.concatenate([self.features[row] for row in rows])
        positions = self.positions[list(rows)].transpose(1, 0, 2).copy()
        return MultimodalBatch(
            torch.from_numpy(features).to(device),
            torch.from_numpy(positions).to(device),
            self.token,
        )


# Tokens of one calibration sample, and its images where it has some.
Sample = tuple[list[int], ImageEmbeddings | None]


def calibration_samples(
    weights: CanonicalWeights, names: str, samples: int, length: int
) -> list[Sample]:
    """`samples` sequences of `length` tokens of a calibration set, or of several (with commas
    between) in turns.

    Samples are made of a set's texts, or of its questions about images with their answers, one chat
    turn after the other. Such a sample begins with a question and may end in the middle of a turn.
    Raises EdgemedError where a set is too short, or has images and the model has no vision.
    """
    sets = calibration_sets(names)
    if samples < len(sets):
        raise EdgemedError(
            f"{samples} samples of {len(sets)} calibration sets leave one out",
            "Ask for at least one sample of each",
        )
    by_set = []
    for n, name in enumerate(sets):
        # The first sets take what does not divide evenly.
        share = samples // len(sets) + (n < samples % len(sets))
        by_set.append(_samples_of_set(weights, name, share, length))
    in_turns = []
    for i in range(len(by_set[0])):
        for set_samples in by_set:
            if i < len(set_samples):
                in_turns.append(set_samples[i])
    return in_turns


def _samples_of_set(
    weights: CanonicalWeights, name: str, samples: int, length: int
) -> list[Sample]:
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    rows = image_rows(name)
    if not rows:
        sequences = calibration_sequences(name, tokenizer, samples, length, weights.checkpoint.path)
        return [(sequence, None) for sequence in sequences]
    if not weights.vision:
        raise EdgemedError(
            f"calibration set '{name}' has images, and {weights.checkpoint.path} reads text only",
            "Calibrate on text",
        )
    vision_encoder = TorchVisionEncoder(weights)
    album = images_album(name)
    joined: list[Sample] = []
    turns: list[tuple[list[int], ImageEmbeddings]] = []
    for row in track(rows, "encoding images"):
        turns.append(_chat_turn(vision_encoder, tokenizer, album, row))
        if sum(len(tokens) for tokens, _ in turns) >= length:
            joined.append(_joined_turns(turns, vision_encoder, length))
            turns = []
            if len(joined) == samples:
                return joined
    raise EdgemedError(
        f"calibration set '{name}' has questions and images for {len(joined)} samples of {length}"
        f" tokens, {samples} are asked for",
        "Ask for fewer or shorter samples, or use a larger set",
    )


def _joined_turns(
    turns: Sequence[tuple[list[int], ImageEmbeddings]],
    vision_encoder: TorchVisionEncoder,
    length: int,
) -> tuple[list[int], ImageEmbeddings]:
    """Chat turns one after the other, truncated at `length` tokens."""
    positions = Positions(vision_encoder.parts, sum(len(tokens) for tokens, _ in turns))
    tokens: list[int] = []
    for turn_tokens, embeddings in turns:
        positions.add(len(tokens), len(turn_tokens), embeddings.positions)
        tokens += turn_tokens
    tokens = tokens[:length]
    features = np.concatenate([embeddings.features for _, embeddings in turns])
    # The truncation may have taken image tokens away: their features go too.
    features = features[: tokens.count(vision_encoder.v.token)]
    return tokens, ImageEmbeddings(features, positions.held[:, :length], vision_encoder.v.token)


def question_prompt(
    vision_encoder: TorchVisionEncoder, tokenizer: Any, album: Album, row: dict[str, Any]
) -> tuple[list[int], ImageEmbeddings]:
    """(tokens, images) of one row's question as a chat turn in the model's own form, up to where
    the answer begins.

    Raises EdgemedError for an image that cannot be opened, and a model without a chat form.
    """
    images = [album.open(image) for image in images_of(row)]
    turn = image_turn(
        vision_encoder.family,
        vision_encoder.v,
        vision_encoder.path,
        tokenizer,
        row["question"],
        len(images),
    )
    tokens, embeddings = vision_encoder.see(turn.tokens(tokenizer), images)
    if embeddings is None:
        raise EdgemedError(f"the row '{row['question'][:80]}' has no image", "Give its image")
    return tokens, embeddings


def _positions(
    vision_encoder: TorchVisionEncoder, prompt: int, embeddings: ImageEmbeddings, length: int
) -> np.ndarray:
    """Rotary positions int64 [parts, length] of a question of `prompt` tokens and of what comes
    after it, whatever that is.
    """
    positions = Positions(vision_encoder.parts, length)
    positions.add(0, prompt, embeddings.positions)
    positions.add(prompt, length - prompt)
    return positions.held


def _answer_tokens(
    vision_encoder: TorchVisionEncoder, tokenizer: Any, text: str, ended: bool = True
) -> list[int]:
    """ended: the answer is complete, so the token that ends an answer follows."""
    tokens = encode(tokenizer, text)
    if vision_encoder.v.token in tokens:
        raise EdgemedError(
            f"the answer '{text[:80]}' has the token that stands for an image",
            "Take it out of the answer",
        )
    eos = vision_encoder.weights.decoder.eos
    if ended and eos is not None:
        tokens = [*tokens, eos]
    return tokens


def _chat_turn(
    vision_encoder: TorchVisionEncoder, tokenizer: Any, album: Album, row: dict[str, Any]
) -> tuple[list[int], ImageEmbeddings]:
    """(tokens, images) of one row as a chat turn, the answer at its end."""
    prompt, embeddings = question_prompt(vision_encoder, tokenizer, album, row)
    tokens = prompt + _answer_tokens(vision_encoder, tokenizer, row["answer"])
    positions = _positions(vision_encoder, len(prompt), embeddings, len(tokens))
    return tokens, ImageEmbeddings(embeddings.features, positions, embeddings.token)


def encode_images(
    weights: CanonicalWeights,
    name: str,
    rows: Sequence[dict[str, Any]],
    length: int,
    limit: int,
    generated: Callable[[], Sequence[dict[str, Any]]] | None = None,
) -> tuple[np.ndarray, np.ndarray, ImageInputs]:
    """(tokens, labels) int64 [rows, length] and the images: one chat turn per row in the model's
    own form, of which only the answer counts.

    limit: bytes the features may take. generated: gives answers {"text", "ended"} that take the
    place of the rows' answers, truncated at `length`. It is called when all questions are known to
    fit. Raises EdgemedError for a row longer than `length`, features that take more than `limit`,
    or an image that cannot be opened.
    """
    vision_encoder = TorchVisionEncoder(weights)
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    album = images_album(name)
    turns = []
    answers = []
    nbytes = 0
    for n, row in enumerate(track(rows, "encoding images")):
        prompt, embeddings = question_prompt(vision_encoder, tokenizer, album, row)
        turns.append((prompt, embeddings))
        # Of an answer that is not there yet, one token at least must fit.
        answer_length = 1
        if generated is None:
            answers.append(_answer_tokens(vision_encoder, tokenizer, row["answer"]))
            answer_length = len(answers[-1])
        _check_length(name, row, len(prompt) + answer_length, length)
        nbytes += embeddings.features.nbytes
        _check_feature_bytes(name, n + 1, nbytes, limit)
    if generated is not None:
        for answer in generated():
            answers.append(
                _answer_tokens(vision_encoder, tokenizer, answer["text"], answer["ended"])
            )
    prompts = [prompt for prompt, _ in turns]
    tokens, labels = padded_sequences(prompts, answers, length, weights.decoder.eos or 0)
    positions = [
        _positions(vision_encoder, len(prompt), embeddings, length) for prompt, embeddings in turns
    ]
    features = tuple(np.asarray(embeddings.features, np.float32) for _, embeddings in turns)
    return tokens, labels, ImageInputs(features, np.stack(positions), vision_encoder.v.token)


def padded_sequences(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], length: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, labels) int64 [rows, length]: each prompt with its answer, truncated or padded.

    Only the answers count: every other label is IGNORED.
    """
    tokens = np.full((len(prompts), length), padding, np.int64)
    labels = np.full((len(prompts), length), IGNORED, np.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        sequence = (prompt + answer)[:length]
        tokens[row, : len(sequence)] = sequence
        labels[row, len(prompt) : len(sequence)] = sequence[len(prompt) :]
    return tokens, labels


def _check_length(name: str, row: dict[str, Any], tokens: int, length: int) -> None:
    if tokens > length:
        raise EdgemedError(
            f"distill: {name}: row '{row.get('id', row['question'])}' is {tokens} tokens long,"
            f" length is {length}",
            "Raise length, or use smaller images",
        )


def _check_feature_bytes(name: str, rows: int, nbytes: int, limit: int) -> None:
    if nbytes > limit:
        raise EdgemedError(
            f"distill: {name}: the image features of {rows} rows take {nbytes / 1e6:.1f} MB,"
            f" cache_limit is {limit / 1e6:.1f} MB",
            "Use smaller images or fewer rows, or raise cache_limit",
        )
