"""Importance of every input column of every matrix, measured on calibration text: llama.cpp's
importance matrix, made by our own pass.

Very low bit types need it and all K- and IQ-types gain from it. It runs layer by layer like every
calibration here, so its memory is that of one layer and the activations of one window.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemed.artifacts.hashing import file_sha256
from edgemed.console import track
from edgemed.errors import EdgemedError, need
from edgemed.models.torch_decoder import block, embed_sequences, linear, load_layer
from edgemed.models.weights import CanonicalWeights

if TYPE_CHECKING:
    import torch

    from edgemed.models.torch_decoder import Layer, TokenSequence

FIX = "Give a .npz file made by edgemed, or the name of a calibration card"


def importance(
    weights: CanonicalWeights, windows: Sequence[TokenSequence]
) -> dict[str, np.ndarray]:
    """Mean squared input per column of each layer matrix over the tokens it was computed for:
    canonical name -> float32 [in].

    windows: tokens and pictures, each of at most the model's context. Follows llama.cpp's
    tools/imatrix (sum of squares / tokens). An expert that no token chose has an importance of 1
    everywhere, as there.
    """
    torch = need("torch", "build")
    d = weights.decoder
    found = {}
    with torch.inference_mode():
        hidden, angles = map(list, zip(*embed_sequences(weights, windows), strict=True))
        for n in track(range(d.layers), "importance"):
            layer = load_layer(weights, n)
            sums = {
                name: torch.zeros(layer[name][0].shape[1], dtype=torch.float64)
                for name in d.matrices(n)
            }
            counts = dict.fromkeys(sums, 0)

            def product(layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
                flat = x.reshape(-1, x.shape[-1])
                sums[name] += flat.double().square().sum(0)
                counts[name] += len(flat)
                return linear(layer, name, x)

            for i, x in enumerate(hidden):
                hidden[i] = block(d, layer, n, x, product=product, angles=angles[i])
            found |= {
                f"layers.{n}.{name}": (
                    total / counts[name] if counts[name] else torch.ones_like(total)
                )
                .float()
                .numpy()
                for name, total in sums.items()
            }
    return found


def save(path: Path, values: Mapping[str, np.ndarray]) -> None:
    np.savez(path, **values)


def digest(path: Path) -> str:
    """sha256 of an importance file. Raises EdgemedError where it is missing."""
    if not Path(path).is_file():
        raise EdgemedError(f"importance file {path} does not exist", FIX)
    return file_sha256(path)


def load(path: Path) -> dict[str, np.ndarray]:
    """Raises EdgemedError where the file is no importance file."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise EdgemedError(f"{path} is not an importance file: {error}", FIX) from None
