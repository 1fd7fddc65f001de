"""How much memory quantizing a model layer by layer takes, counted before it is begun. This decides
whether hidden states go to disk.

A limit the user gives is a promise, so a step that would break it is refused at the start, with the
smallest limit that is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import psutil

from edgemed import units
from edgemed.errors import EdgemedError
from edgemed.formatting import size
from edgemed.models.torch_decoder import layer_elements
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.method import layer_method
from edgemed.quantization.settings import QuantizeSettings

# What libraries load and allocate when they are first used, beside the tensors.
LOADED = 64 << 20
FLOAT32 = 4  # bytes


def spilled(weights: CanonicalWeights, calibrated: bool, settings: QuantizeSettings) -> bool:
    """Whether the hidden states go to disk. calibrated: whether there are any.

    Raises EdgemedError where max_memory does not even hold the work on one layer.
    """
    if settings.max_memory:
        limit = units.size(settings.max_memory, "max_memory")
    else:
        limit = round(0.6 * psutil.virtual_memory().available)
    if not calibrated:
        return False
    d = weights.decoder
    numbers = max(held(weights, n, settings) for n in range(d.layers))
    # The embedding table takes twice its size while it is read.
    numbers = max(numbers, 2 * d.vocab * d.hidden)
    work = psutil.Process().memory_info().rss + LOADED + FLOAT32 * numbers
    if settings.max_memory and work > limit:
        raise EdgemedError(
            f"max_memory {settings.max_memory} is too small: work on one layer of this model takes"
            f" {size(work)}",
            f"Give at least {size(work)}",
        )
    # With a correction the hidden states of the float model are kept too.
    streams = 2 if settings.correction else 1
    states = settings.samples * settings.length * d.hidden * FLOAT32 * streams
    return work + states > limit


def held(weights: CanonicalWeights, n: int, settings: QuantizeSettings) -> int:
    """Numbers that work on layer n holds at most, experts included: the float layer and its
    quantized copy; moments; a matrix being quantized, four times.
    """
    shapes = {
        name: weights.parts[f"layers.{n}.{name}"].shape for name in weights.decoder.matrices(n)
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    moments = layer_method(settings.method).moments
    if settings.budget or moments is None:
        # A budget measures the sensitivity of all matrices at once.
        numbers = moments_at_once(shapes, list(shapes) if settings.budget else ())
    else:
        numbers = moments(shapes, settings)
    return layer_elements(weights, n) + sum(sizes) + numbers + 4 * max(sizes)


def moments_at_once(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> int:
    """Numbers of the second moments of these matrices, and of the largest one's inverse factor and
    two copies. shapes: matrix of one layer -> (out, in).
    """
    largest = max(shape[1] for shape in shapes.values())
    return sum(shapes[name][1] ** 2 for name in names) + 3 * largest**2
