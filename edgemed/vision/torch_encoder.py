"""A vision tower and its projector in torch, float32: what every engine's image features are
compared with.

Built from a family's Vision values, one layer in memory at a time, like the text decoder beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgemed.errors import EdgemedError, need
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.architecture import VisionConfig
from edgemed.models.weights import CanonicalWeights
from edgemed.vision.preprocessing import (
    Kept,
    Patches,
    Seen,
    axial_angles,
    check_places,
    patches,
    placed,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image


def features(weights: CanonicalWeights, found: Patches) -> dict[str, torch.Tensor]:
    """'tower' [patches, width] and 'features' [features, hidden] of one image."""
    torch = need("torch", "build")
    v: VisionConfig = weights.vision
    with torch.inference_mode():
        x = _embedded(weights, torch.from_numpy(found.pixels))
        angles = torch.from_numpy(axial_angles(found, v)) if v.frequencies else None
        for n in range(v.layers):
            x = _layer(weights, v, f"vision.layers.{n}", x, angles)
        x = x if v.frequencies else x[1:]
        return {"tower": x, "features": _projected(weights, v, x)}


def _embedded(weights: CanonicalWeights, pixels: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    v = weights.vision
    x = _linear(weights, "vision.patch", pixels)
    if not v.frequencies:
        x = torch.cat([weights.table("vision.class").reshape(1, -1), x]) + weights.table(
            "vision.positions"
        )
    return _norm(weights, "vision.pre_norm", x) if v.pre_norm else x


def _norm(weights: CanonicalWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    weight, bias = weights.norm(name)
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, weights.vision.norm_eps)


def _linear(weights: CanonicalWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    matrix = weights.matrix(name)
    return torch.nn.functional.linear(x, matrix.dense(), matrix.bias)


def _activated(v: VisionConfig, x: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    return (
        x * torch.sigmoid(1.702 * x)
        if v.activation == "quick_gelu"
        else torch.nn.functional.gelu(x)
    )


def _layer(
    weights: CanonicalWeights,
    v: VisionConfig,
    name: str,
    x: torch.Tensor,
    angles: torch.Tensor | None,
) -> torch.Tensor:
    torch = need("torch", "build")
    n = len(x)
    head = v.width // v.heads
    q, k, value = (
        part.reshape(n, v.heads, head).transpose(0, 1)
        for part in _linear(weights, f"{name}.qkv", _norm(weights, f"{name}.attn_norm", x)).chunk(
            3, -1
        )
    )
    if angles is not None:
        q = _rotated(q, angles)
        k = _rotated(k, angles)
    out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], value[None])[0]
    x = x + _linear(weights, f"{name}.o", out.transpose(0, 1).reshape(n, v.width))
    return x + _linear(
        weights,
        f"{name}.down",
        _activated(v, _linear(weights, f"{name}.up", _norm(weights, f"{name}.mlp_norm", x))),
    )


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def _projected(weights: CanonicalWeights, v: VisionConfig, x: torch.Tensor) -> torch.Tensor:
    torch = need("torch", "build")
    x = _norm(weights, "vision.projector.norm", x) if v.projector_norm else x
    x = torch.nn.functional.gelu(
        _linear(weights, "vision.projector.first", x.reshape(len(x) // v.merge**2, -1))
    )
    return _linear(weights, "vision.projector.second", x)


class TorchVisionEncoder:
    """The eyes of a checkpoint, in float32: what OnnxVisionEncoder is to an engine. family: whose
    prompts and answers its model knows.
    """

    def __init__(self, weights: CanonicalWeights):
        if not weights.vision:
            raise EdgemedError(
                f"{weights.checkpoint.path} reads text only",
                "Ask it without an image, or give a model that sees",
            )
        self.weights = weights
        self.v = weights.vision
        self.family = weights.family
        self.parts = max(weights.decoder.rope_axes, default=0) + 1
        self.context = weights.decoder.context
        self.kept = Kept(self._computed)

    def features(self, image: Image.Image) -> Seen:
        """(features [n, hidden], (rows, columns) of features) of one RGB image; computed once for
        the same pixels.
        """
        return self.kept.features(image)

    def _computed(self, image: Image.Image) -> Seen:
        found = patches(image, self.v)
        return features(self.weights, found)["features"].numpy(), (
            found.rows // self.v.merge,
            found.columns // self.v.merge,
        )

    def see(
        self, tokens: Sequence[int], images: Sequence[Image.Image]
    ) -> tuple[list[int], ImageEmbeddings | None]:
        """As OnnxVisionEncoder.see."""
        check_places(tokens, self.v.token, len(images))
        return placed(
            tokens, [self.features(image) for image in images], self.v, self.parts, self.context
        )

    def close(self) -> None:
        self.kept.found.clear()
