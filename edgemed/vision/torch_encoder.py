"""A vision tower and its projector in torch, float32: what every engine's image features are
compared with.

It is built from a family's VisionConfig with one layer in memory at a time, like the text decoder.
Build only: no device imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from edgemed.errors import EdgemedError
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.architecture import VisionConfig
from edgemed.models.weights import CanonicalWeights
from edgemed.vision.preprocessing import (
    EncodedImage,
    FeatureCache,
    Patches,
    axial_angles,
    check_places,
    patches,
    placed,
)

if TYPE_CHECKING:
    from PIL import Image


def features(
    weights: CanonicalWeights, image: Patches, layers: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """'tower' [patches, width] and 'features' [features, hidden] of one image. layers: numbers of
    those that are computed, None for all.
    """
    v = weights.require_vision()
    with torch.inference_mode():
        x = _embedded(weights, torch.from_numpy(image.pixels))
        angles = None
        if v.frequencies:
            angles = torch.from_numpy(axial_angles(image, v))
        for n in range(v.layers) if layers is None else layers:
            x = _layer(weights, v, f"vision.layers.{n}", x, angles)
        if not v.frequencies:
            # The class token stands in front; the projector reads the patches alone.
            x = x[1:]
        return {"tower": x, "features": _projected(weights, v, x)}


def _embedded(weights: CanonicalWeights, pixels: torch.Tensor) -> torch.Tensor:
    v = weights.require_vision()
    x = _linear(weights, "vision.patch", pixels)
    if not v.frequencies:
        class_row = weights.table("vision.class").reshape(1, -1)
        x = torch.cat([class_row, x]) + weights.table("vision.positions")
    if v.pre_norm:
        x = _norm(weights, "vision.pre_norm", x)
    return x


def _norm(weights: CanonicalWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = weights.norm(name)
    eps = weights.require_vision().norm_eps
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _linear(weights: CanonicalWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    matrix = weights.matrix(name)
    return torch.nn.functional.linear(x, matrix.dense(), matrix.bias)


def _activated(v: VisionConfig, x: torch.Tensor) -> torch.Tensor:
    if v.activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return torch.nn.functional.gelu(x)


def _layer(
    weights: CanonicalWeights,
    v: VisionConfig,
    name: str,
    x: torch.Tensor,
    angles: torch.Tensor | None,
) -> torch.Tensor:
    n = len(x)
    head = v.width // v.heads
    qkv = _linear(weights, f"{name}.qkv", _norm(weights, f"{name}.attn_norm", x))
    # each [patches, width] -> [heads, patches, head size]
    q, k, value = (part.reshape(n, v.heads, head).transpose(0, 1) for part in qkv.chunk(3, -1))
    if angles is not None:
        q = _rotated(q, angles)
        k = _rotated(k, angles)
    mixed = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], value[None])[0]
    x = x + _linear(weights, f"{name}.o", mixed.transpose(0, 1).reshape(n, v.width))
    up = _linear(weights, f"{name}.up", _norm(weights, f"{name}.mlp_norm", x))
    return x + _linear(weights, f"{name}.down", _activated(v, up))


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [heads, patches, head size], element i turned with element i + half of the head."""
    a, b = x.chunk(2, -1)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _projected(weights: CanonicalWeights, v: VisionConfig, x: torch.Tensor) -> torch.Tensor:
    if v.projector_norm:
        x = _norm(weights, "vision.projector.norm", x)
    # Patches that are merged lie behind each other, so a longer row holds them.
    merged = x.reshape(len(x) // v.merge**2, -1)
    inner = torch.nn.functional.gelu(_linear(weights, "vision.projector.first", merged))
    return _linear(weights, "vision.projector.second", inner)


class TorchVisionEncoder:
    """The vision encoder of a checkpoint, in float32: what OnnxVisionEncoder is to an engine.
    family: whose prompts and answers its model knows.
    """

    def __init__(self, weights: CanonicalWeights):
        if not weights.vision:
            raise EdgemedError(
                f"{weights.checkpoint.path} reads text only",
                "Ask it without an image, or give a vision model",
            )
        self.weights = weights
        self.path = weights.checkpoint.path
        self.v = weights.vision
        self.family = weights.family
        self.parts = max(weights.decoder.rope_axes, default=0) + 1
        self.context = weights.decoder.context
        self.cached = FeatureCache(self._encode)

    def features(self, image: Image.Image) -> EncodedImage:
        """(features [n, hidden], (rows, columns) of features) of one RGB image; computed once for
        the same pixels.
        """
        return self.cached.features(image)

    def _encode(self, image: Image.Image) -> EncodedImage:
        image_patches = patches(image, self.v)
        embedded = features(self.weights, image_patches)["features"].numpy()
        grid = (image_patches.rows // self.v.merge, image_patches.columns // self.v.merge)
        return embedded, grid

    def see(
        self, tokens: Sequence[int], images: Sequence[Image.Image]
    ) -> tuple[list[int], ImageEmbeddings | None]:
        """As OnnxVisionEncoder.see."""
        check_places(tokens, self.v.token, len(images))
        return placed(
            tokens, [self.features(image) for image in images], self.v, self.parts, self.context
        )

    def close(self) -> None:
        self.cached.entries.clear()
