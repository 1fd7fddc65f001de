"""bitsandbytes' nf4 (Dettmers et al. 2023, arXiv 2305.14314): 4-bit codes of a table for normally
distributed weights, in blocks of 64 along a row.

It needs no calibration text. transformers reads it; edgemed's engines read it as floats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgemed.errors import EdgemedError
from edgemed.models import bitsandbytes
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization import bitsandbytes_checkpoint
from edgemed.quantization.method import CheckpointMethod


def write(weights: CanonicalWeights, out: Path, double_quant: bool) -> dict[str, Any]:
    """Write the checkpoint. Raises EdgemedError for a model with vision or experts, or rows that
    are no multiple of a block.
    """
    bitsandbytes_checkpoint.check_model(weights)
    for key, name in bitsandbytes_checkpoint.matrix_keys(weights).items():
        columns = weights.parts[name].shape[1]
        if columns % bitsandbytes.BLOCK:
            raise EdgemedError(
                f"'{key}': rows of {columns} weights are no multiple of {bitsandbytes.BLOCK}, and"
                " bitsandbytes 0.50.2 expands such wrongly on a CPU",
                "Use bnb-int8, gptq or rtn",
            )

    def quantize(_: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return bitsandbytes.nf4(weight, double_quant)

    return bitsandbytes_checkpoint.write(weights, out, "nf4", double_quant, quantize)


METHOD = CheckpointMethod(
    write,
    packing=(4, bitsandbytes.BLOCK),
    packing_text="4 bits and blocks of 64",
    double_quant=True,
)
