"""All layers of a model quantized one after the other, each calibrated on what the quantized ones
before it put out.

Only one layer is in memory at a time. A finished layer lies on disk, so a killed run goes on from
its last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from edgemed.console import track
from edgemed.models.torch_decoder import embed_sequences
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.hidden_states import Activations, begin
from edgemed.quantization.layer_progress import Layers
from edgemed.quantization.layerwise import layer_packings
from edgemed.quantization.method import LayerMethod
from edgemed.quantization.packed_checkpoint import layer_tensors
from edgemed.quantization.settings import Packings, QuantizeSettings

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import TokenSequence


def quantize_layers(
    weights: CanonicalWeights,
    method: LayerMethod,
    samples: Sequence[TokenSequence] | None,
    packings: Packings,
    settings: QuantizeSettings,
    finished: Layers,
    on_disk: bool,
) -> None:
    """Every layer that is not in `finished` yet. samples: calibration samples, None for a method
    that reads none; on_disk: whether hidden states lie there and not in memory.
    """
    d = weights.decoder
    start = finished.done
    streams: list[Activations] = []
    bits = {bits for bits, _ in packings.values()}
    precision = settings.budget or f"{min(bits)} bit"
    with torch.inference_mode():
        if method.calibrated and samples is not None:
            streams = _streams(weights, method, samples, settings, finished, on_disk)
            begin(weights, samples, streams, start)
        for n in track(range(start, d.layers), f"quantize ({settings.method}, {precision})"):
            _one_layer(weights, n, method, streams, packings, settings, finished)


def _streams(
    weights: CanonicalWeights,
    method: LayerMethod,
    samples: Sequence[TokenSequence],
    settings: QuantizeSettings,
    finished: Layers,
    on_disk: bool,
) -> list[Activations]:
    """The hidden states of the quantized model, and where inputs are corrected those of the float
    model too.
    """
    shape = (settings.samples, settings.length, weights.decoder.hidden)
    angles = None
    if weights.decoder.rope_axes:
        angles = [turned for _, turned in embed_sequences(weights, samples)]
    names = ["hidden"]
    if method.corrects_inputs and settings.correction:
        names.append("exact")
    return [Activations(finished.folder, name, shape, on_disk, angles) for name in names]


def _one_layer(
    weights: CanonicalWeights,
    n: int,
    method: LayerMethod,
    streams: Sequence[Activations],
    packings: Packings,
    settings: QuantizeSettings,
    finished: Layers,
) -> None:
    """One layer quantized and saved; of it nothing is held while the next one is worked on."""
    layer = method.quantize_layer(weights, n, streams, layer_packings(packings, n), settings)
    for stream in streams:
        stream.commit()
    errors = {f"layers.{n}.{name}": matrix.errors for name, matrix in layer.matrices.items()}
    ranges = {f"layers.{n}.{name}": largest for name, largest in layer.activations.items()}
    facts = {
        "errors": errors,
        "alpha": layer.alpha,
        "experts": layer.experts,
        "ranges": ranges,
    }
    finished.save(layer_tensors(weights, n, layer, packings), facts)
