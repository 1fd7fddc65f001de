"""Integer grids shared by steps and targets: rounding to nearest, GGUF's Q8_0, and regrouping of packed matrices.

One place, so that the same weight becomes the same integers wherever it is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    import torch

    from edgemed.weights import Packed


@dataclass(frozen=True)
class Ints:
    """A quantized matrix ready for an engine: q uint8 [out, in], scales float32 [out, blocks], block: inputs per scale.

    The zero is at 2^(bits-1), or at `zeros` uint8 [out, blocks] where a matrix has its own.
    """

    q: np.ndarray
    scales: np.ndarray
    bits: int
    block: int
    zeros: np.ndarray | None = None


def scale_of(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric scale 2 max|w| / (2^bits - 1) along the last axis (AutoGPTQ's), rounded to float16 because that is how it is stored.

    Returns float32; never zero.
    """
    torch = need("torch", "build")
    scale = weight.abs().amax(-1) * (2 / (2**bits - 1))
    scale = scale.to(torch.float16).float()
    # A group of zeros, or one whose scale underflows, keeps the smallest scale float16 can store exactly enough.
    return torch.where(scale > 0, scale, torch.full_like(scale, 6.104e-05))


def round_to(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers 0..2^bits-1 with zero at 2^(bits-1), as uint8; `scale` broadcasts against `weight`."""
    torch = need("torch", "build")
    zero = 1 << (bits - 1)
    return (weight / scale).round_().add_(zero).clamp_(0, 2 * zero - 1).to(torch.uint8)


def rtn(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest: weight [out, in] -> (q uint8 [out, in], scales float32 [out, in/group]).

    Raises EdgemedError where the group does not divide a row.
    """
    rows, columns = weight.shape
    if columns % group:
        raise EdgemedError(f"a group of {group} does not divide a row of {columns} weights", "Choose a group among 32, 64, 128, -1 that does")
    torch = need("torch", "build")
    q = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // group)
    for part in _row_chunks(rows, columns):
        grouped = weight[part].reshape(-1, columns // group, group)
        scales[part] = scale_of(grouped, bits)
        q[part] = round_to(grouped, scales[part][..., None], bits).reshape(-1, columns)
    return q, scales


def ggml_q8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GGUF's Q8_0 (ggml quantize_row_q8_0_ref): weight float32 [out, in] -> (q uint8 [out, in] with zero at 128, scales float32 [out, in/32])."""
    rows, columns = weight.shape
    q, scales = np.empty((rows, columns), np.uint8), np.empty((rows, columns // 32), np.float32)
    for part in _row_chunks(rows, columns):
        blocks = weight[part].reshape(-1, columns // 32, 32)
        scale = np.abs(blocks).max(-1) / np.float32(127)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        scaled = blocks * inverse[..., None]
        # ggml rounds half away from zero (roundf), numpy rounds half to even.
        rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
        q[part], scales[part] = (rounded + 128).reshape(-1, columns), scale.astype(np.float16)
    return q, scales


def _row_chunks(rows: int, columns: int) -> list[slice]:
    # A million weights at a time: temporaries stay in the cache and out of the peak memory.
    step = max(1, (1 << 20) // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def block_ints(matrix: Packed) -> Ints:
    """A packed matrix as Ints: the block a power of two of at most 128, scales (and uneven zeros) repeated to fit it."""
    block = 128
    while matrix.group % block:
        block //= 2
    repeat = matrix.group // block
    zeros = None if matrix.symmetric else matrix.zeros.repeat_interleave(repeat, 1).numpy()
    return Ints(matrix.q.numpy(), matrix.scales.repeat_interleave(repeat, 1).numpy(), matrix.bits, block, zeros)
