"""A checkpoint in bitsandbytes' layouts, as transformers loads them. The quantization itself is
left to bitsandbytes, whose integers are the definition.

Nothing is folded into the weights, so transformers' own quantization of the same model gives the
same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from edgemed.console import track
from edgemed.errors import EdgemedError
from edgemed.models import bitsandbytes
from edgemed.models.checkpoint import Writer
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.packed_checkpoint import layer_matrices

# (name of the tensor, weight float [out, in]) -> the module's tensors by their endings
QuantizeModule = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


def check_model(weights: CanonicalWeights) -> None:
    """Raise EdgemedError for a model with parts that transformers would take for quantized too."""
    if weights.vision or weights.decoder.experts:
        reason = "a vision tower" if weights.vision else "experts"
        raise EdgemedError(
            f"{weights.checkpoint.path} has {reason}, which transformers would take for quantized"
            " too",
            "Use gptq, awq or rtn",
        )


def matrix_keys(weights: CanonicalWeights) -> dict[str, str]:
    """Every module that is quantized -> its canonical matrix."""
    return {key: name for name in layer_matrices(weights) for key in weights.keys[name]}


def write(
    weights: CanonicalWeights,
    out: Path,
    kind: Literal["nf4", "int8"],
    double_quant: bool,
    quantize: QuantizeModule,
) -> dict[str, Any]:
    """Write the layers' matrices as `quantize` stores them, all other tensors as they are stored.
    Returns the manifest's notes.
    """
    matrices = matrix_keys(weights)
    dtypes = Counter(weights.checkpoint.tensors[f"{key}.weight"].dtype for key in matrices)
    ((dtype, _),) = dtypes.most_common(1)
    config = dict(weights.checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    config["quantization_config"] = bitsandbytes.config(kind, double_quant, dtype)
    writer = Writer(out, config, weights.checkpoint.path)
    errors = {}
    nbytes = 0
    count = 0
    for tensor in track(list(weights.checkpoint.tensors), f"quantize (bitsandbytes {kind})"):
        value = weights.checkpoint.read(tensor)
        key, _, ending = tensor.rpartition(".")
        if ending != "weight" or key not in matrices:
            writer.add(tensor, value)
            continue
        if weights.parts[matrices[key]].conv1d:
            value = value.T.contiguous()
        module = quantize(tensor, value)
        exact = value.float()
        error = (bitsandbytes.expand(module) - exact).norm() / exact.norm()
        errors[key] = {"weight": float(error)}
        count += value.numel()
        for ending, stored in module.items():
            nbytes += stored.nbytes
            writer.add(f"{key}.{ending}", stored)
    writer.close()
    return {
        "layout": f"bitsandbytes {kind}",
        "errors": errors,
        "bits_per_weight": 8 * nbytes / count,
        "folded_attention_scale": False,
    }
