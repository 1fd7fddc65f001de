"""Rows of questions about images as windows that a step can calibrate on or a student learn from:
tokens, which of them count, and what the images became.

Vision tower and projector are neither rounded nor trained in these passes, so every image is looked
at once and its features are kept in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.artifacts import hashing
from edgemed.console import track
from edgemed.data.text_sets import calibration_windows, read_card, read_jsonl
from edgemed.errors import EdgemedError, need
from edgemed.inference.session import ImageEmbeddings, Positions
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.vision.image_io import Album
from edgemed.vision.preprocessing import prompt_tokens
from edgemed.vision.torch_encoder import TorchVisionEncoder

if TYPE_CHECKING:
    import torch

IGNORED = -100  # transformers' label of a token that is not counted


@dataclass(frozen=True)
class Sights:
    """What the images of each window became. features: float32 [n, hidden] per window, for its
    tokens `token`, in order; positions int64 [windows, parts, length], which go on behind the
    answer that is there, for another one that may stand in its place.
    """

    features: tuple[np.ndarray, ...]
    positions: np.ndarray
    token: int

    def only(self, rows: Sequence[int]) -> Sights:
        """Those of these windows alone."""
        return Sights(
            tuple(self.features[row] for row in rows), self.positions[list(rows)], self.token
        )

    def of(self, rows: Sequence[int], device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(features of these windows one after the other, positions [parts, rows, length],
        token).
        """
        torch = need("torch", "build")
        found = (
            np.concatenate([self.features[row] for row in rows]),
            self.positions[list(rows)].transpose(1, 0, 2).copy(),
        )
        return *(torch.from_numpy(array).to(device) for array in found), self.token


def pictured(name: str) -> list[dict[str, Any]] | None:
    """Rows {"image" or "images", "question", "answer"} of a .jsonl file, None where its first row
    names no image.

    Raises EdgemedError naming a row that lacks one of them.
    """
    file = read_card(name).file("calibration")
    rows = read_jsonl(file) if file.suffix == ".jsonl" else []
    if not rows or not rows[0].keys() & {"image", "images"}:
        return None
    for number, row in enumerate(rows, 1):
        if not images_of(row) or not all(
            isinstance(row.get(key), str) and row[key] for key in ("question", "answer")
        ):
            raise EdgemedError(
                f"{file}: row {number} is no question about an image",
                'Rows look like {"id": .., "image": "name.png", "question": .., "answer": ..}',
            )
    return rows


def images_of(row: dict[str, Any]) -> list[str]:
    names = row.get("images", [row.get("image")])
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def album_of(name: str) -> Album:
    """The images of a set: files beside its rows, or members of the zip file its card names."""
    card = read_card(name)
    return Album(
        card.file("calibration").parent, card.files["images"].name if "images" in card.files else ""
    )


def digest(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """sha256 over the images' bytes, in the rows' order. Raises EdgemedError for one that is
    missing.
    """
    album = album_of(name)
    return hashing.digest(
        [hashlib.sha256(album.read(image)).hexdigest() for row in rows for image in images_of(row)]
    )


def sets_of(names: str) -> list[str]:
    """The calibration sets of one parameter: names or files with commas between; a file whose own
    name has a comma is one.
    """
    return [names] if Path(names).is_file() else names.split(",")


def calibration_digests(names: str) -> dict[str, str]:
    """sha256 of the rows of one calibration set or several (with commas between), and of their
    images.
    """
    found = {}
    for n, name in enumerate(sets_of(names)):
        place = f" {n + 1}" if n else ""
        rows = pictured(name)
        found |= {f"calibration{place}": read_card(name).digest("calibration")} | (
            {f"images{place}": digest(name, rows)} if rows else {}
        )
    return found


def calibration(
    weights: CanonicalWeights, names: str, samples: int, length: int
) -> list[tuple[list[int], ImageEmbeddings | None]]:
    """`samples` windows of `length` tokens of a calibration set, or of several (with commas
    between) in turns.

    Windows are of its texts, or of its questions about images with their answers, one chat turn
    after the other: such a window begins with a question and ends in the middle of one. Raises
    EdgemedError where a set is too short, or has images and the model sees none.
    """
    sets = sets_of(names)
    if samples < len(sets):
        raise EdgemedError(
            f"{samples} samples of {len(sets)} calibration sets leave one out",
            "Ask for at least one sample of each",
        )
    each = [
        _of_one(weights, name, samples // len(sets) + (n < samples % len(sets)), length)
        for n, name in enumerate(sets)
    ]
    return [found[i] for i in range(len(each[0])) for found in each if i < len(found)]


def _of_one(
    weights: CanonicalWeights, name: str, samples: int, length: int
) -> list[tuple[list[int], ImageEmbeddings | None]]:
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    rows = pictured(name)
    if not rows:
        return [
            (window, None)
            for window in calibration_windows(
                name, tokenizer, samples, length, weights.checkpoint.path
            )
        ]
    if not weights.vision:
        raise EdgemedError(
            f"calibration set '{name}' has images, and {weights.checkpoint.path} reads text only",
            "Calibrate on text",
        )
    vision_encoder = TorchVisionEncoder(weights)
    album = album_of(name)
    found = []
    turns = []
    for row in track(rows, "looks at images"):
        turns.append(_turn(vision_encoder, tokenizer, album, row))
        if sum(len(tokens) for tokens, _ in turns) >= length:
            found.append(_joined(turns, vision_encoder, length))
            turns = []
            if len(found) == samples:
                return found
    problem = (
        f"calibration set '{name}' has questions and images for {len(found)} windows of {length}"
        f" tokens, {samples} are asked for"
    )
    raise EdgemedError(problem, "Ask for fewer or shorter samples, or use a larger set")


def _joined(
    turns: Sequence[tuple[list[int], ImageEmbeddings]],
    vision_encoder: TorchVisionEncoder,
    length: int,
) -> tuple[list[int], ImageEmbeddings]:
    """Chat turns one after the other, cut at `length` tokens."""
    held = Positions(vision_encoder.parts, sum(len(tokens) for tokens, _ in turns))
    tokens: list[int] = []
    for more, seen in turns:
        held.add(len(tokens), len(more), seen.positions)
        tokens += more
    tokens = tokens[:length]
    features = np.concatenate([seen.features for _, seen in turns])[
        : tokens.count(vision_encoder.v.token)
    ]
    return tokens, ImageEmbeddings(features, held.held[:, :length], vision_encoder.v.token)


def asked(
    vision_encoder: TorchVisionEncoder, tokenizer: Any, album: Album, row: dict[str, Any]
) -> tuple[list[int], ImageEmbeddings]:
    """(tokens, pictures) of one row's question as a chat turn in the model's own form, up to where
    the answer begins.
    """
    images = [album.open(image) for image in images_of(row)]
    return vision_encoder.see(
        prompt_tokens(
            tokenizer,
            vision_encoder.family.chat(row["question"], len(images), vision_encoder.v.conversation),
            vision_encoder.v,
        ),
        images,
    )


def _placed(
    vision_encoder: TorchVisionEncoder, prompt: int, seen: ImageEmbeddings, length: int
) -> np.ndarray:
    """Positions int64 [parts, length] of a question of `prompt` tokens and of what comes after it,
    whatever that is.
    """
    held = Positions(vision_encoder.parts, length)
    held.add(0, prompt, seen.positions)
    held.add(prompt, length - prompt)
    return held.held


def _answer(weights: CanonicalWeights, tokenizer: Any, text: str, ended: bool = True) -> list[int]:
    found = encode(tokenizer, text)
    eos = weights.decoder.eos
    if weights.vision.token in found:
        raise EdgemedError(
            f"the answer '{text[:80]}' has the token that stands for an image",
            "Take it out of the answer",
        )
    return found + ([eos] if ended and eos is not None else [])


def _turn(
    vision_encoder: TorchVisionEncoder, tokenizer: Any, album: Album, row: dict[str, Any]
) -> tuple[list[int], ImageEmbeddings]:
    """(tokens, pictures) of one row as a chat turn, the answer at its end."""
    prompt, seen = asked(vision_encoder, tokenizer, album, row)
    whole = prompt + _answer(vision_encoder.weights, tokenizer, row["answer"])
    return whole, ImageEmbeddings(
        seen.features, _placed(vision_encoder, len(prompt), seen, len(whole)), seen.token
    )


def look(
    weights: CanonicalWeights,
    name: str,
    rows: Sequence[dict[str, Any]],
    length: int,
    limit: int,
    written: Callable[[], Sequence[dict[str, Any]]] | None = None,
) -> tuple[np.ndarray, np.ndarray, Sights]:
    """(tokens, labels) int64 [rows, length] and the images: one chat turn per row in the model's
    own form, of which only the answer counts.

    limit: bytes the features may take. written: gives answers {"text", "ended"} that take the place
    of the rows', cut at `length`; called when all questions are known to fit. Raises EdgemedError
    for a row longer than `length`, images that take more, or one that cannot be opened.
    """
    vision_encoder = TorchVisionEncoder(weights)
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    album = album_of(name)
    turns = []
    said = []
    held = 0
    for n, row in enumerate(track(rows, "looks at images")):
        turns.append(asked(vision_encoder, tokenizer, album, row))
        said += [] if written else [_answer(weights, tokenizer, row["answer"])]
        held += turns[-1][1].features.nbytes
        whole = len(turns[-1][0]) + (1 if written else len(said[-1]))
        if whole > length:
            raise EdgemedError(
                f"distill: {name}: row '{row.get('id', row['question'])}' is {whole} tokens long,"
                f" length is {length}",
                "Raise length, or use smaller images",
            )
        if held > limit:
            problem = (
                f"the image features of {n + 1} rows take {held / 1e6:.1f} MB, cache_limit is"
                f" {limit / 1e6:.1f} MB"
            )
            raise EdgemedError(
                f"distill: {name}: {problem}",
                "Use smaller images or fewer rows, or raise cache_limit",
            )
    said = (
        [_answer(weights, tokenizer, row["text"], row["ended"]) for row in written()]
        if written
        else said
    )
    tokens, labels = (
        np.full((len(rows), length), fill, np.int64) for fill in (weights.decoder.eos or 0, IGNORED)
    )
    for (prompt, _), answer, ids, counted in zip(turns, said, tokens, labels, strict=True):
        whole = (prompt + answer)[:length]
        ids[: len(whole)] = whole
        counted[len(prompt) : len(whole)] = whole[len(prompt) :]
    positions = np.stack(
        [_placed(vision_encoder, len(prompt), seen, length) for prompt, seen in turns]
    )
    return (
        tokens,
        labels,
        Sights(
            tuple(np.asarray(seen.features, np.float32) for _, seen in turns),
            positions,
            weights.vision.token,
        ),
    )
