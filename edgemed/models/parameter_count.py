"""How many parameters a checkpoint has, and in which tensors.

Counted from the shapes of the family's parts, so that nothing has to be read.
"""

from __future__ import annotations

import math

from edgemed.models.architecture import Architecture, DecoderConfig
from edgemed.models.weights import CanonicalWeights

SPARE = "vision.spare."  # layers of a vision encoder that are stored and never read


def sizes(weights: CanonicalWeights) -> dict[str, tuple[str, int, int]]:
    """canonical part -> (kind, number of weights, number of biases). A matrix that is the embedding
    table is not counted again.

    The numbers come from the architecture, so packed integers count as the weights they stand for.
    """
    counts = {}
    seen = set()
    for name, part in weights.parts.items():
        keys = weights.keys[name]
        if keys in seen:
            continue
        seen.add(keys)
        has_bias = any(f"{key}.bias" in weights.checkpoint.tensors for key in keys)
        biases = part.shape[0] if has_bias else 0
        counts[name] = (part.kind, math.prod(part.shape), biases)
    return counts


def parameters(weights: CanonicalWeights) -> int:
    """Number of weights and biases, tied tensors counted once, stored buffers that carry no
    information not counted.
    """
    return sum(weight + bias for _, weight, bias in sizes(weights).values())


def decoder_parameters(family: Architecture, config: DecoderConfig) -> int:
    """Number of weights and biases of a decoder as its family would store it, tied tensors counted
    once. No checkpoint is needed: the student of a distillation is counted before it exists.
    """
    modules = {}
    for part in family.parts(config).values():
        for module, shape in part.stored():
            outputs = shape[-1 if part.conv1d else 0]
            modules[module] = math.prod(shape) + (outputs if part.bias else 0)
    return sum(modules.values())
