"""How large keys and values get, channel by channel, on calibration text: the fixed scales of an
int8 KV cache.

ONNX Runtime's attention rounds what it writes into the cache with scales that are constants of the
graph, so they have to be known when the engine is made. Rotary positions turn a pair of channels
into each other; the pair's length bounds both at every position, also those beyond the calibration
windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgemed.console import track
from edgemed.errors import need
from edgemed.models.torch_decoder import block, embed_sequences, linear, load_layer
from edgemed.models.weights import CanonicalWeights

if TYPE_CHECKING:
    import torch

    from edgemed.models.torch_decoder import Layer, TokenSequence

LARGEST = 127


def kv_scales(
    weights: CanonicalWeights, windows: Sequence[TokenSequence]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(key scale, value scale) of every layer, float32 [1, kv_heads, 1, head_dim]: the largest
    magnitude of the channel in the windows / 127.

    windows: of tokens, and images among them, each of at most the model's context. One layer is in
    memory at a time. A channel that is always zero gets the scale 1e-6.
    """
    torch = need("torch", "build")
    d = weights.unfolded
    found = []
    half = len(d.rope_frequencies)
    with torch.inference_mode():
        hidden, angles = map(list, zip(*embed_sequences(weights, windows), strict=True))
        for n in track(range(d.layers), "cache scales"):
            layer = load_layer(weights, n)
            most = [torch.zeros(d.kv_heads, d.head_dim) for _ in "kv"]

            def product(layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
                y = linear(layer, name, x)
                if name == "qkv":
                    for known, part in zip(
                        most, y.split([d.q_size, d.kv_size, d.kv_size], -1)[1:], strict=True
                    ):
                        part = part.reshape(-1, d.kv_heads, d.head_dim).abs()
                        if half and known is most[0]:
                            pair = torch.hypot(part[..., :half], part[..., half : 2 * half])
                            part = torch.cat([pair, pair, part[..., 2 * half :]], -1)
                        torch.maximum(known, part.amax(0), out=known)
                return y

            for i, x in enumerate(hidden):
                hidden[i] = block(d, layer, n, x, product=product, angles=angles[i])
            found.append(
                tuple(
                    (m / LARGEST).clamp_min(1e-6).numpy().reshape(1, d.kv_heads, 1, d.head_dim)
                    for m in most
                )
            )
    return found
