"""bitsandbytes' int8 (Dettmers et al. 2022, arXiv 2208.07339): 8 bits with one scale per row.

It needs no calibration text. transformers reads it; edgemed's engines read it as floats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgemed.models import bitsandbytes
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization import bitsandbytes_checkpoint
from edgemed.quantization.method import CheckpointMethod


def write(weights: CanonicalWeights, out: Path, double_quant: bool) -> dict[str, Any]:
    """Write the checkpoint. Raises EdgemedError for a model with vision or experts, or a weight
    that float16 cannot hold.
    """
    bitsandbytes_checkpoint.check_model(weights)
    return bitsandbytes_checkpoint.write(weights, out, "int8", double_quant, bitsandbytes.int8)


METHOD = CheckpointMethod(write, packing=(8, -1), packing_text="8 bits and one scale per row")
