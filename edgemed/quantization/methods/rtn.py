"""RTN (round to nearest): every weight becomes the nearest integer of its group's grid. It needs no
calibration text.

It is the baseline that every other method has to beat, and enough at 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgemed.models.torch_decoder import load_layer
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.gptq import Solution
from edgemed.quantization.grids import rtn
from edgemed.quantization.hidden_states import Activations
from edgemed.quantization.layerwise import QuantizedLayer, group_of, with_errors
from edgemed.quantization.method import LayerMethod
from edgemed.quantization.settings import Packings, QuantizeSettings


def quantize_layer(
    weights: CanonicalWeights,
    n: int,
    streams: Sequence[Activations],
    packings: Packings,
    settings: QuantizeSettings,
) -> QuantizedLayer:
    """Layer n to the nearest integers. streams: not read."""
    layer = load_layer(weights, n)
    matrices = {}
    for name, (bits, group) in packings.items():
        weight, bias = layer[name]
        q, scales = rtn(weight, bits, group_of(weight, group), settings.clip)
        solution = Solution(q, scales)
        matrices[name] = with_errors(weight, bias, solution, solution.dense(bits))
    return QuantizedLayer(matrices)


# Searching each scale for the least squared error gains nothing here, so `clip` is off by default.
METHOD = LayerMethod(quantize_layer, calibrated=False, clip=False)
