"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounds a matrix column by column and moves each column's error into the later ones.

Pure tensor arithmetic, apart from files and families, so that it can be tested against exact answers and used by any step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemed.errors import EdgemedError, need
from edgemed.grid import clipped_scale, round_to, rtn, scale_of

if TYPE_CHECKING:
    import torch

# Columns whose errors are applied to the rest of the matrix in one product; a multiple of every group but -1.
BLOCK = 128


@dataclass(frozen=True)
class Solution:
    """q uint8 [out, in] with zero at 2^(bits-1), scales float32 [out, in/group] that float16 holds exactly."""

    q: torch.Tensor
    scales: torch.Tensor

    def dense(self, bits: int) -> torch.Tensor:
        """The weights the integers stand for, float32 [out, in]."""
        group = self.q.shape[1] // self.scales.shape[1]
        return (self.q.float() - (1 << (bits - 1))) * self.scales.repeat_interleave(group, 1)


class Hessian:
    """The second moment 2 X^T X / n of a matrix's inputs, `moment` float32 [in, in], kept as a running mean over batches.

    cross: also `cross` 2 E^T X / n, with E the inputs the same tokens have where nothing was rounded.
    """

    def __init__(self, columns: int, cross: bool = False):
        torch = need("torch", "build")
        self.moment, self.rows = torch.zeros(columns, columns), 0
        self.cross = torch.zeros(columns, columns) if cross else None

    def add(self, x: torch.Tensor, exact: torch.Tensor | None = None) -> None:
        """x, exact float32 [..., in]; exact where there is a cross moment."""
        flat = x.reshape(-1, self.moment.shape[0])
        if not len(flat):
            return
        rows = self.rows + flat.shape[0]
        self.moment.addmm_(flat.T, flat, beta=self.rows / rows, alpha=2 / rows)
        if self.cross is not None:
            self.cross.addmm_(exact.reshape(-1, flat.shape[1]).T, flat, beta=self.rows / rows, alpha=2 / rows)
        self.rows = rows


def corrected(weight: torch.Tensor, hessian: Hessian, share: float, damp: float) -> torch.Tensor:
    """The weights [out, in] that GPTQ shall round instead of `weight`, so that the error its inputs already carry is made good too.

    Of all V, W + W (C - H)(H + damp)^-1 has the outputs X V^T nearest to those of the exact inputs, E W^T (H moment, C cross moment); that correction is
    taken by `share`, because calibration text is finite.
    The cross moment is used up, to hold one matrix of its size less. This is GPTAQ's target (Li et al. 2025, arXiv 2504.02692) in closed form, with QEP's share
    (Arai and Ichikawa 2025, arXiv 2504.09629).
    """
    torch = need("torch", "build")
    right = hessian.cross.sub_(hessian.moment).T @ weight.T
    hessian.cross = None
    damped = hessian.moment.clone()
    damped.diagonal().add_(damp * float(damped.diagonal().mean()) + 1e-12)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        raise singular(damp)
    return weight + share * torch.cholesky_solve(right, lower).T


def solve(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, damp: float, act_order: bool = False, clip: bool = False) -> Solution:
    """Integers for weight float32 [out, in] given the second moment [in, in] of its inputs; group divides in.

    act_order: columns in order of falling second moment. Scales then belong to the original groups and are fixed beforehand, so
    column i keeps group i // group and every engine can carry the integers. Otherwise a group's scale is taken when it is reached,
    after the errors of earlier columns have arrived. A column whose input is always zero is rounded to nearest.
    clip: scales by grid.clipped_scale, a column's error weighed as GPTQ weighs it, by 1 / upper[i, i]^2 (what the later columns cannot make good).
    Raises EdgemedError where the second moment cannot be inverted.
    """
    torch = need("torch", "build")
    rows, columns = weight.shape
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    upper = _inverse_root(hessian, order if act_order else None, damp)
    importance = torch.empty(columns)
    importance[order] = upper.diagonal() ** -2
    # Transposed: the loop walks over columns, which are then contiguous.
    work = weight.T[order].contiguous()
    q = torch.empty(columns, rows, dtype=torch.uint8)
    fixed = act_order or group > BLOCK
    scales = rtn(weight, bits, group, clip, importance)[1].T.contiguous() if fixed else torch.empty(columns // group, rows)
    groups, zero = (order // group).tolist(), 1 << (bits - 1)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty(end - start, rows)
        for column in range(start, end):
            if not fixed and column % group == 0:
                reached = work[column : column + group].T.contiguous()
                scales[groups[column]] = clipped_scale(reached, bits, importance[column : column + group]) if clip else scale_of(reached, bits)
            scale = scales[groups[column]]
            q[column] = round_to(work[column], scale, bits)
            error = (work[column] - (q[column].float() - zero) * scale) / upper[column, column]
            work[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(columns)
    return Solution(q[inverse].T.contiguous(), scales.T.contiguous())


def _inverse_root(hessian: torch.Tensor, order: torch.Tensor | None, damp: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment (the rows GPTQ's update needs), its columns in `order`; float32 [in, in]."""
    torch = need("torch", "build")
    # Rounding can leave a nearly singular moment indefinite in float32: then damp ten times, a hundred times as much.
    for times in (1, 10, 100):
        work = hessian.clone() if order is None else hessian[order[:, None], order]
        diagonal = work.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal += times * damp * float(diagonal.mean())
        # Each step lets go of the one before: these are the largest matrices of all.
        work, failed = torch.linalg.cholesky_ex(work)
        if failed == 0:
            work = torch.cholesky_inverse(work)
            work, failed = torch.linalg.cholesky_ex(work, upper=True)
            if failed == 0:
                return work
    raise singular(damp)


def singular(damp: float) -> EdgemedError:
    return EdgemedError(f"the calibration inputs give no invertible second moment at damp {damp}", "Use more calibration samples, or a larger damp")


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """|X (W - W')^T|^2 / |X W^T|^2 over the calibration inputs: the share of a matrix's output that rounding changed."""
    delta = weight - rounded
    return float(((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum().clamp_min(1e-30))
