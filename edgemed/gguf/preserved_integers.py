"""Integers of a quantized checkpoint as blocks of llama.cpp's types.

Nothing is rounded again, so that an engine carries the very integers that GPTQ chose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.quantization.grids import widened

if TYPE_CHECKING:
    from edgemed.models.weights import Packed


def carried_type(bits: int) -> str:
    """The type whose grid a symmetric GPTQ matrix fits exactly: integer minus its middle, times a
    float16 scale per 32. Fewer bits than 4 are widened.
    """
    return "Q8_0" if bits == 8 else "Q4_0"


def carried(matrix: Packed, name: str, bits: int) -> np.ndarray:
    """The very integers of a packed matrix as Q4_0 or Q8_0 bytes, uint8 [rows, bytes per row]; a
    group's scale is repeated per 32. bits: 4 or 8, to which fewer are widened.

    Raises EdgemedError for act-order, asymmetric integers, a group that is not a multiple of 32, or
    a scale beyond float16.
    """
    for broken, what in (
        (matrix.g_idx is not None, "act-order groups"),
        (not matrix.symmetric, "asymmetric integers"),
        (matrix.group % 32, f"groups of {matrix.group}, not a multiple of 32"),
    ):
        if broken:
            fix = (
                "Quantize again with sym, without act_order and with group 32, 64 or 128; or leave"
                " from_checkpoint out"
            )
            raise EdgemedError(
                f"{name} has {what}, which {carried_type(matrix.bits)} cannot carry", fix
            )
    matrix = widened(matrix, (bits,))
    rows, columns = matrix.q.shape
    if float(matrix.scales.abs().max()) > 65504:
        raise EdgemedError(
            f"{name}: a scale does not fit into float16",
            "The integers cannot be carried; leave from_checkpoint out",
        )
    scales = (
        matrix.scales.numpy()
        .astype(np.float16)
        .repeat(matrix.group // 32, axis=1)[:, : columns // 32]
    )
    q = matrix.q.numpy().reshape(rows, columns // 32, 32)
    # Q4_0 keeps input j in the low and input j + 16 in the high half of byte j; Q8_0 keeps signed
    # bytes.
    data = q[..., :16] | q[..., 16:] << 4 if matrix.bits == 4 else (q - np.uint8(128))
    return np.concatenate([scales[..., None].view(np.uint8), data], axis=-1).reshape(rows, -1)
