"""Preserved integers: those of a quantized checkpoint as blocks of llama.cpp's types.

They are only repacked. Nothing is quantized again, so an engine has the very integers that GPTQ
chose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.quantization.grids import widened

if TYPE_CHECKING:
    from edgemed.models.weights import Packed


def preserved_type(bits: int) -> str:
    """The type whose grid a symmetric GPTQ matrix fits exactly: integer minus its middle, times a
    float16 scale per 32. Fewer bits than 4 are widened.
    """
    return "Q8_0" if bits == 8 else "Q4_0"


def preserved(matrix: Packed, name: str, bits: int) -> np.ndarray:
    """The integers of a packed matrix as Q4_0 or Q8_0 bytes, uint8 [rows, bytes per row].

    The scale of a group is repeated for every 32 inputs. name: the matrix in messages. bits: 4 or
    8, to which integers of fewer bits are widened.

    Raises EdgemedError for act-order, asymmetric integers, a group that is not a multiple of 32, or
    a scale beyond float16.
    """
    if problem := _unsuitable(matrix):
        raise EdgemedError(
            f"{name} has {problem}, which {preserved_type(matrix.bits)} cannot carry",
            "Quantize again with sym, without act_order and with group 32, 64 or 128; or leave"
            " from_checkpoint out",
        )
    matrix = widened(matrix, (bits,))
    rows, columns = matrix.q.shape
    if float(matrix.scales.abs().max()) > 65504:
        raise EdgemedError(
            f"{name}: a scale does not fit into float16",
            "The integers cannot be preserved; leave from_checkpoint out",
        )
    blocks = columns // 32
    # The last group may reach past the end of a row.
    scales = matrix.scales.numpy().astype(np.float16).repeat(matrix.group // 32, axis=1)
    scales = scales[:, :blocks]
    q = matrix.q.numpy().reshape(rows, blocks, 32)
    # A block is its scale, two bytes, and then its integers.
    scale_bytes = scales[..., None].view(np.uint8)
    integer_bytes = _packed(q, matrix.bits)
    return np.concatenate([scale_bytes, integer_bytes], axis=-1).reshape(rows, -1)


def _packed(q: np.ndarray, bits: int) -> np.ndarray:
    """Integers uint8 [rows, blocks, 32] as a block stores them, uint8 [rows, blocks, 4 * bits]."""
    if bits == 4:
        # Q4_0: byte j has input j in its low half and input j + 16 in its high half.
        return q[..., :16] | q[..., 16:] << 4
    # Q8_0: signed bytes. Subtracting the middle wraps around in uint8 as in two's complement.
    return q - np.uint8(128)


def _unsuitable(matrix: Packed) -> str | None:
    """What of a matrix llama.cpp's types cannot express, or None."""
    if matrix.g_idx is not None:
        return "act-order groups"
    if not matrix.symmetric:
        return "asymmetric integers"
    if matrix.group % 32:
        return f"groups of {matrix.group}, not a multiple of 32"
    return None
