"""GPTQ with corrected inputs, to the symmetric integers of the AutoGPTQ layout. The arithmetic is
in quantization/gptq.py and the walk through a layer in layerwise.py.

It is the default method ('auto'): of those here it is nearest to the float model at 4 bits and
below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.gptq import InverseFactor, Solution, quantize_columns
from edgemed.quantization.grids import rtn
from edgemed.quantization.hidden_states import Activations
from edgemed.quantization.layerwise import QuantizedLayer, Quantizer, gptq_layer, group_of
from edgemed.quantization.method import LayerMethod
from edgemed.quantization.settings import Packings, QuantizeSettings


def integer_quantizer(packings: Packings, settings: QuantizeSettings) -> Quantizer:
    """GPTQ to the integers and scales of each matrix' (bits, group); RTN where there is no inverse
    factor.
    """

    def quantize(
        name: str, weight: torch.Tensor, factor: InverseFactor | None
    ) -> tuple[Solution, torch.Tensor]:
        bits, group = packings[name]
        group = group_of(weight, group)
        if factor is None:
            solution = Solution(*rtn(weight, bits, group))
        else:
            solution = quantize_columns(
                weight, factor, bits, group, settings.act_order, settings.clip
            )
        return solution, solution.dense(bits)

    return quantize


def quantize_layer(
    weights: CanonicalWeights,
    n: int,
    streams: Sequence[Activations],
    packings: Packings,
    settings: QuantizeSettings,
) -> QuantizedLayer:
    """Layer n. streams: the hidden states, and where inputs are corrected those of the float model
    too.
    """
    exact = streams[1] if len(streams) > 1 else None
    quantizer = integer_quantizer(packings, settings)
    return gptq_layer(weights, n, streams[0], exact, quantizer, settings)


def moments(shapes: Mapping[str, tuple[int, ...]], settings: QuantizeSettings) -> int:
    """Of one matrix at a time: a moment that holds its inverse factor too (but not in another
    order), and the cross moment of its inputs with the exact ones.
    """
    most = 0
    for rows, columns in shapes.values():
        count = (1 + settings.act_order) * columns**2
        if settings.correction:
            count += columns * min(columns, rows)
        most = max(most, count)
    return most


METHOD = LayerMethod(quantize_layer, moments, corrects_inputs=True)
