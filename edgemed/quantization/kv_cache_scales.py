"""How large keys and values get, channel by channel, on calibration text: the fixed scales of an
int8 KV cache.

ONNX Runtime's attention quantizes what it writes into the cache with scales that are constants of
the graph, so they have to be known when the engine is made. Rotary positions turn a pair of
channels into each other; the pair's length bounds both at every position, also those beyond the
calibration samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemed.console import track
from edgemed.models.torch_decoder import block, embed_sequences, linear, load_layer
from edgemed.models.weights import CanonicalWeights

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer, TokenSequence

LARGEST = 127


def kv_scales(
    weights: CanonicalWeights, samples: Sequence[TokenSequence]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(key scale, value scale) of every layer, float32 [1, kv_heads, 1, head_dim]: the largest
    magnitude of the channel in the samples / 127.

    samples: of tokens, and images among them, each of at most the model's context. One layer is in
    memory at a time. A channel that is always zero gets the scale 1e-6.
    """
    d = weights.unfolded
    scales = []
    half = len(d.rope_frequencies)
    with torch.inference_mode():
        hidden, angles = map(list, zip(*embed_sequences(weights, samples), strict=True))
        for n in track(range(d.layers), "cache scales"):
            layer = load_layer(weights, n)
            largest_key = torch.zeros(d.kv_heads, d.head_dim)
            largest_value = torch.zeros(d.kv_heads, d.head_dim)

            def product(layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
                y = linear(layer, name, x)
                if name == "qkv":
                    _, key, value = y.split([d.q_size, d.kv_size, d.kv_size], -1)
                    key = key.reshape(-1, d.kv_heads, d.head_dim).abs()
                    value = value.reshape(-1, d.kv_heads, d.head_dim).abs()
                    if half:
                        # Both channels of a pair can become as large as the pair is long.
                        pair = torch.hypot(key[..., :half], key[..., half : 2 * half])
                        key = torch.cat([pair, pair, key[..., 2 * half :]], -1)
                    torch.maximum(largest_key, key.amax(0), out=largest_key)
                    torch.maximum(largest_value, value.amax(0), out=largest_value)
                return y

            for i, x in enumerate(hidden):
                hidden[i] = block(d, layer, n, x, product=product, angles=angles[i])
            scales.append((_scale(largest_key), _scale(largest_value)))
    return scales


def _scale(largest: torch.Tensor) -> np.ndarray:
    """float32 [1, kv_heads, 1, head_dim] of the largest magnitudes [kv_heads, head_dim]."""
    return (largest / LARGEST).clamp_min(1e-6).numpy().reshape(1, len(largest), 1, -1)
