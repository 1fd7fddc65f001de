"""A checkpoint as edgemed reads it, in the same form as the witness has it: ids, stop tokens,
pixels, scores at a chosen depth, and which tensors were read.

Everything here calls what generate, export and the parity check call themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from edgemed.inference.session import ImageEmbeddings, embedding_ids
from edgemed.models import torch_decoder
from edgemed.models.architecture import DecoderConfig
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.special_tokens import stop_tokens
from edgemed.models.tokenizer import (
    chat_text,
    chat_tokens,
    encode_text,
    has_chat_template,
    open_tokenizer,
)
from edgemed.models.weights import CanonicalWeights
from edgemed.verification.witness.native import Depth
from edgemed.vision import torch_encoder
from edgemed.vision.image_io import open_image
from edgemed.vision.image_turn import ImageTurn, image_turn
from edgemed.vision.preprocessing import (
    Patches,
    feature_count,
    patches,
    token_positions,
)


@dataclass(frozen=True)
class RecordedCheckpoint(Checkpoint):
    """A checkpoint that remembers every tensor read from it. digests: name -> of its numbers."""

    digests: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        if name not in self.digests and tensor.is_floating_point():
            self.digests[name] = digest(tensor)
        return tensor


def recorded(checkpoint: Checkpoint) -> RecordedCheckpoint:
    """The same checkpoint, from which nothing was read yet."""
    values = {entry.name: getattr(checkpoint, entry.name) for entry in fields(Checkpoint)}
    return RecordedCheckpoint(**values)


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's numbers as float32, whatever the precision they are stored in."""
    numbers = tensor.detach().float().contiguous().reshape(-1)
    return hashlib.sha256(numbers.view(torch.uint8).numpy().data).hexdigest()


@dataclass(frozen=True)
class Probe:
    """Tokens to score, at plain or given positions, and perhaps an image among them. positions:
    one per token, None where they are counted from 0.
    """

    what: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...] | None = None
    image: Patches | None = None


class Tokens:
    """edgemed's tokenizer and chat of a checkpoint. Raises EdgemedError where there is none."""

    def __init__(self, path: Path, decoder: DecoderConfig):
        self.path = path
        self.tokenizer = open_tokenizer(path, decoder.vocab)
        self.eos = ""
        if decoder.eos is not None:
            self.eos = self.tokenizer.id_to_token(decoder.eos) or ""

    @property
    def has_template(self) -> bool:
        return has_chat_template(self.path)

    def ids(self, text: str) -> list[int]:
        """Ids of a text as generate reads a prompt."""
        return encode_text(self.tokenizer, text)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as one prompt."""
        return chat_text(self.path, messages, self.eos)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation as chat reads it."""
        return chat_tokens(self.path, self.tokenizer, messages, self.eos)

    def word(self, token: int) -> str:
        """A token as a person reads it."""
        return repr(self.tokenizer.id_to_token(token) or f"<{token}>")


def stop_ids(weights: CanonicalWeights) -> set[int]:
    """Ids at which edgemed's generate stops."""
    checkpoint = weights.checkpoint
    return set(stop_tokens(checkpoint.path, checkpoint.config, weights.decoder.eos))


def image_prompt(weights: CanonicalWeights, tokens: Tokens, question: str) -> ImageTurn:
    """A question about one image in the model's own form."""
    vision = weights.require_vision()
    return image_turn(weights.family, vision, tokens.path, tokens.tokenizer, question, 1)


def image_prompt_ids(
    weights: CanonicalWeights, tokens: Tokens, turn: ImageTurn, file: Path
) -> list[int]:
    """Ids of a prompt about an image, its place repeated for each of the image's features."""
    vision = weights.require_vision()
    count = feature_count(patches(open_image(file), vision), vision)
    ids: list[int] = []
    for token in turn.tokens(tokens.tokenizer):
        ids += [token] * (count if token == vision.token else 1)
    return ids


def pixels(weights: CanonicalWeights, file: Path) -> Patches:
    """An image file as the vision encoder gets it."""
    return patches(open_image(file), weights.require_vision())


def scores(
    weights: CanonicalWeights, probes: Sequence[Probe], depth: Depth, hidden: bool
) -> list[np.ndarray]:
    """float32 [tokens, width] of each probe, with the layers of `depth` alone. hidden: what the
    output matrix would read, instead of what it gives.

    One layer is in memory at a time, as everywhere.
    """
    d = weights.decoder
    with torch.inference_mode():
        tables = torch_decoder.tables(weights)
        states = [_embedded(weights, tables, probe, depth) for probe in probes]
        del tables
        for n in depth.text:
            layer = torch_decoder.load_layer(weights, n)
            states = [
                (torch_decoder.block(d, layer, n, x, angles=angles), angles) for x, angles in states
            ]
            del layer
        final, matrix, bias = torch_decoder.output_head(weights)
        results = []
        for x, _ in states:
            x = torch_decoder.norm(d, final, "final_norm", x)[0]
            results.append((x if hidden else torch.nn.functional.linear(x, matrix, bias)).numpy())
        return results


def _embedded(
    weights: CanonicalWeights,
    tables: tuple[torch.Tensor, torch.Tensor | None],
    probe: Probe,
    depth: Depth,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # (hidden states before the first layer [1, tokens, hidden], rotary angles, None where positions
    # are learned)
    d = weights.decoder
    images = _images(weights, probe, depth)
    places = torch.tensor(probe.positions or range(len(probe.tokens)))
    words, learned = tables
    x = words[torch.from_numpy(embedding_ids(probe.tokens, images))][None]
    if learned is not None:
        x = x + learned[places]
    if images is not None:
        x[0, torch.tensor(probe.tokens) == images.token] = torch.from_numpy(images.features)
    if d.positions != "rope":
        return x, None
    parts = max(d.rope_axes, default=0) + 1
    counted = places.expand(parts, -1)
    if images is not None and parts > 1:
        counted = torch.from_numpy(images.positions)
    return x, torch_decoder.rope_angles(d, counted)


def _images(weights: CanonicalWeights, probe: Probe, depth: Depth) -> ImageEmbeddings | None:
    image = probe.image
    if image is None:
        return None
    vision = weights.require_vision()
    features = torch_encoder.features(weights, image, depth.vision)["features"].numpy()
    grid = (image.rows // vision.merge, image.columns // vision.merge)
    parts = max(weights.decoder.rope_axes, default=0) + 1
    positions = token_positions(list(probe.tokens), vision.token, [grid], parts)
    return ImageEmbeddings(features, positions, vision.token)


def image_tokens(weights: CanonicalWeights, image: Patches) -> list[int]:
    """Ids in the places of one image, with what stands around them."""
    vision = weights.require_vision()
    return [*vision.before, *[vision.token] * feature_count(image, vision), *vision.after]
