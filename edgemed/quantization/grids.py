"""Integer grids shared by steps and targets: round to nearest (RTN), GGUF's Q8_0, and regrouping of
packed matrices.

One place, so that the same weight becomes the same integers wherever it is quantized. Runtimes
import it on a device, so torch is not imported at the top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    import torch

    from edgemed.models.weights import CanonicalWeights, Packed

# Inputs per scale that every runtime has kernels for, the usual one first.
GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Ints:
    """A quantized matrix ready for an engine: q uint8 [out, in], scales float32 [out, blocks],
    block: inputs per scale.

    The zero is at 2^(bits-1), or at `zeros` uint8 [out, blocks] where a matrix has its own.
    """

    q: np.ndarray
    scales: np.ndarray
    bits: int
    block: int
    zeros: np.ndarray | None = None


def scale_of(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric scale 2 max|w| / (2^bits - 1) along the last axis (AutoGPTQ's), rounded to float16
    because that is how it is stored.

    Returns float32; never zero.
    """
    torch = need("torch", "build")
    scale = weight.abs().amax(-1) * (2 / (2**bits - 1))
    scale = scale.to(torch.float16).float()
    # A group of zeros, or one whose scale underflows, keeps the smallest scale float16 can store
    # exactly enough.
    return torch.where(scale > 0, scale, torch.full_like(scale, 6.104e-05))


# Smallest share of the plain scale that clipping tries: with fewer bits, more of the tail is worth
# cutting.
LEAST_SHARE = {2: 0.3, 3: 0.45, 4: 0.6, 8: 0.9}
TRIES = 20


def clipped_scale(
    weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The scale among TRIES shares of scale_of's (1 down to LEAST_SHARE) with the smallest sum of
    importance * (weight - quantized)^2 along the last axis.

    importance broadcasts against weight, None: plain squared error. Ties go to the larger scale.
    Returns float32 that float16 holds exactly.
    """
    torch = need("torch", "build")
    zero = 1 << (bits - 1)
    full = scale_of(weight, bits)
    best = full.clone()
    least = torch.full_like(full, float("inf"))
    for share in torch.linspace(1, LEAST_SHARE[bits], TRIES).tolist():
        scale = (full * share).to(torch.float16).float().clamp_min_(6.104e-05)
        # In place where possible: weight is a chunk of a million numbers.
        quantized = (weight / scale[..., None]).round_().clamp_(-zero, zero - 1)
        squares = (quantized * scale[..., None]).sub_(weight).square_()
        if importance is not None:
            squares.mul_(importance)
        error = squares.sum(-1)
        better = error < least
        best = torch.where(better, scale, best)
        least = torch.where(better, error, least)
    return best


def quantize_to(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers 0..2^bits-1 with zero at 2^(bits-1), as uint8; `scale` broadcasts against
    `weight`.
    """
    torch = need("torch", "build")
    zero = 1 << (bits - 1)
    return (weight / scale).round_().add_(zero).clamp_(0, 2 * zero - 1).to(torch.uint8)


def fitting_group(columns: int) -> int | None:
    """The largest usual group that divides a row of `columns` weights, None where none does."""
    return next((group for group in GROUPS if columns % group == 0), None)


def matrix_columns(weights: CanonicalWeights) -> list[int]:
    """The lengths of the rows of all layer matrices, each once."""
    columns = set()
    for name, part in weights.parts.items():
        if name.startswith("layers.") and part.kind == "matrix":
            columns.add(part.shape[1])
    return sorted(columns)


def group_refused(weights: CanonicalWeights, group: int | None) -> str | None:
    """Why the layer matrices cannot have this group (None: the largest that divides each), or
    None.
    """
    columns = matrix_columns(weights)
    rows = " and ".join(map(str, columns))
    if group is None:
        if all(fitting_group(count) for count in columns):
            return None
        return f"no group of 128, 64, 32 divides rows of {rows}; choose another precision"
    if all(count % group == 0 for count in columns):
        return None
    fitting = [str(g) for g in GROUPS if all(count % g == 0 for count in columns)]
    way_out = f"choose group {' or '.join(fitting)}, or leave it out" if fitting else "leave it out"
    return f"group {group} does not divide rows of {rows}; {way_out}"


def dense_packings(weights: CanonicalWeights, bits: int, group: int | None) -> set[tuple[int, int]]:
    """Every (bits, group) of the layer matrices where a target itself rounds them. group: None for
    the largest that divides each.
    """
    return {(bits, group or fitting_group(count) or -1) for count in matrix_columns(weights)}


def rtn(
    weight: torch.Tensor,
    bits: int,
    group: int,
    clip: bool = False,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RTN, round to nearest: weight [out, in] -> (q uint8 [out, in], scales float32 [out,
    in/group]).

    clip: scales by clipped_scale, each input weighed with `importance` [in]. Raises EdgemedError
    where the group does not divide a row.
    """
    rows, columns = weight.shape
    if columns % group:
        raise EdgemedError(
            f"a group of {group} does not divide a row of {columns} weights",
            "Choose a group among 32, 64, 128, -1 that does",
        )
    torch = need("torch", "build")
    q = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // group)
    for part in _row_chunks(rows, columns):
        grouped = weight[part].reshape(-1, columns // group, group)
        weighed = None if importance is None else importance.reshape(columns // group, group)
        scales[part] = clipped_scale(grouped, bits, weighed) if clip else scale_of(grouped, bits)
        q[part] = quantize_to(grouped, scales[part][..., None], bits).reshape(-1, columns)
    return q, scales


def ggml_q8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GGUF's Q8_0 (ggml quantize_row_q8_0_ref): weight float32 [out, in] -> (q uint8 [out, in] with
    zero at 128, scales float32 [out, in/32]).
    """
    rows, columns = weight.shape
    q = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, columns // 32), np.float32)
    for part in _row_chunks(rows, columns):
        blocks = weight[part].reshape(-1, columns // 32, 32)
        scale = np.abs(blocks).max(-1) / np.float32(127)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        scaled = blocks * inverse[..., None]
        # ggml rounds half away from zero (roundf), numpy rounds half to even.
        rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
        q[part] = (rounded + 128).reshape(-1, columns)
        scales[part] = scale.astype(np.float16)
    return q, scales


def _row_chunks(rows: int, columns: int) -> list[slice]:
    # A million weights at a time: temporaries stay in the cache and out of the peak memory.
    step = max(1, (1 << 20) // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def widths_label(packings: Iterable[tuple[int, int]]) -> str:
    """'4-bit', or '3- and 8-bit' where integers of several widths are mixed."""
    return "- and ".join(str(bits) for bits in sorted({bits for bits, _ in packings})) + "-bit"


def packings_label(packings: Iterable[tuple[int, int]]) -> str:
    """(bits, group) of every matrix as a person would name it: 'int4 g128', 'int8 per column',
    'int4 g64/128', 'int4/8 mixed'.
    """
    distinct = sorted(set(packings))
    if len(distinct) == 1:
        ((bits, group),) = distinct
        return f"int{bits} {'per column' if group == -1 else f'g{group}'}"
    widths = sorted({bits for bits, _ in distinct})
    groups = [group for _, group in distinct]
    if len(widths) == 1 and -1 not in groups:
        return f"int{widths[0]} g{'/'.join(map(str, groups))}"
    return f"int{'/'.join(map(str, widths))} mixed"


def widened(matrix: Packed, widths: tuple[int, ...]) -> Packed:
    """The same matrix with its integers in the next width among `widths`: the numbers stay, the
    zero moves with them.
    """
    bits = min(b for b in widths if b >= matrix.bits)
    if bits == matrix.bits:
        return matrix
    moved = (1 << bits - 1) - (1 << matrix.bits - 1)
    return replace(matrix, q=matrix.q + moved, zeros=matrix.zeros + moved, bits=bits)


def block_ints(matrix: Packed, widths: tuple[int, ...] = (4, 8)) -> Ints:
    """A packed matrix as Ints of a width among `widths`. The block a power of two of at most 128,
    scales (and uneven zeros) repeated to fit it.
    """
    matrix = widened(matrix, widths)
    block = 128
    while matrix.group % block:
        block //= 2
    repeat = matrix.group // block
    zeros = None if matrix.symmetric else matrix.zeros.repeat_interleave(repeat, 1).numpy()
    return Ints(
        matrix.q.numpy(),
        matrix.scales.repeat_interleave(repeat, 1).numpy(),
        matrix.bits,
        block,
        zeros,
    )
