"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): quantizes a matrix column by column and moves each
column's error into the later ones.

Pure tensor arithmetic, apart from files and families, so that it can be tested against exact
answers and used by any step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgemed.errors import EdgemedError
from edgemed.quantization.grids import clipped_scale, rtn, scale_of

# Columns whose errors are applied to the rest of the matrix in one product; a multiple of every
# group but -1.
BLOCK = 128
# Within a block: columns whose errors reach each other one by one, the rest of the block in a
# product; divides every group but -1.
SUB_BLOCK = 32
# Columns of one product where a square is known to be symmetric or a triangle.
TILE = 1024
# Columns that the factorisation takes at once; divides TILE.
FACTOR_TILE = 256
# Float32 can leave a nearly singular second moment indefinite: then damp ten times, a hundred times
# as much.
DAMP_RETRIES = (1, 10, 100)


@dataclass(frozen=True)
class Solution:
    """A matrix on a symmetric integer grid.

    q uint8 [out, in] with zero at 2^(bits-1); scales float32 [out, in/group] that float16 holds
    exactly.
    """

    q: torch.Tensor
    scales: torch.Tensor

    def dense(self, bits: int) -> torch.Tensor:
        """The weights that the integers stand for, float32 [out, in]."""
        weight = self.q.float().sub_(1 << (bits - 1))
        weight.view(*self.scales.shape, -1).mul_(self.scales[..., None])
        return weight


class Hessian:
    """The second moment 2 X^T X / n of a matrix' inputs, `moment` float32 [in, in], kept as a
    running mean over calibration samples.

    weight: the matrix [out, in] whose inputs shall be corrected; `add` is then also given E, the
    inputs that the same tokens have where nothing is quantized.
    """

    def __init__(self, columns: int, weight: torch.Tensor | None = None):
        self.lower = torch.zeros(columns, columns)
        self.rows = 0
        self.weight = weight
        self.diagonal: list[torch.Tensor] | None = None
        # 2 X^T E / n, or that times W^T summed up token by token: whichever is smaller.
        self.cross: torch.Tensor | None = None
        if weight is not None:
            self.cross = torch.zeros(columns, min(columns, weight.shape[0]))

    def add(
        self,
        x: torch.Tensor,
        exact: torch.Tensor | None = None,
        product: torch.Tensor | None = None,
    ) -> None:
        """Take in the inputs of some tokens.

        x, exact: float32 [..., in]; `exact` where there is a weight. product: exact W^T, float32
        [..., out], where it is known already.
        """
        flat = x.reshape(-1, self.lower.shape[0])
        if not len(flat):
            return
        rows = self.rows + flat.shape[0]
        beta = self.rows / rows
        alpha = 2 / rows
        for tile in _tiles(flat.shape[1]):
            # It is symmetric: only what lies at or below the diagonal's tiles is summed up.
            below = self.lower[tile.start :, tile]
            below.addmm_(flat[:, tile.start :].T, flat[:, tile], beta=beta, alpha=alpha)
        if self.cross is not None and self.weight is not None:
            if exact is None:
                raise ValueError("a weight is corrected by its exact inputs, and there are none")
            right = exact.reshape(flat.shape)
            if not _is_tall(self.weight):
                right = right @ self.weight.T if product is None else product.reshape(len(flat), -1)
            self.cross.addmm_(flat.T, right, beta=beta, alpha=alpha)
        self.rows = rows

    @property
    def moment(self) -> torch.Tensor:
        """The whole matrix, what lies above the diagonal's tiles filled in."""
        mirror(self.lower)
        return self.lower

    def inverse_factor(self, damp: float, act_order: bool = False) -> InverseFactor:
        """As `inverse_factor_of`. In plain order it takes the half of the square above the
        diagonal's tiles, so that no second square is held: `moment` is gone then.
        """
        if act_order:
            return inverse_factor_of(self.moment, damp, True)
        self.diagonal = [self.lower[tile, tile].clone() for tile in _tiles(len(self.lower))]
        for times in DAMP_RETRIES:
            for tile, block in zip(_tiles(len(self.lower)), self.diagonal, strict=True):
                self.lower[tile, tile] = block
            work, damping = _damp(self.moment, times * damp)
            if _factor_inverse(work):
                return InverseFactor(work, torch.arange(len(work)), damping)
        raise _not_invertible(damp)

    def output_error(self, weight: torch.Tensor, quantized: torch.Tensor) -> float:
        """|X (W - W')^T|^2 / |X W^T|^2: the share of a matrix' output over these inputs that
        quantization changed. It may be called before or after `inverse_factor`.
        """
        diagonal = self.diagonal
        if diagonal is None:
            diagonal = [self.lower[tile, tile] for tile in _tiles(len(self.lower))]
        error = _energy(weight - quantized, self.lower, diagonal)
        return error / max(_energy(weight, self.lower, diagonal), 1e-30)

    def corrected(self, factor: InverseFactor, share: float) -> torch.Tensor:
        """The weights [out, in] that GPTQ shall quantize instead of `weight` W, so that the error
        its inputs already carry is made good too. It can be called once only.

        Of all V, the one whose outputs X V^T are nearest to those of the exact inputs, E W^T,
        damping holding it to W, is (H + damp)^-1 (X^T E + damp) W^T, transposed (H = X^T X); W goes
        the way to it by `share`, because calibration text is finite. This is GPTAQ's target (Li et
        al. 2025, arXiv 2504.02692) in closed form, with QEP's share (Arai and Ichikawa 2025, arXiv
        2504.09629).

        Raises ValueError for a Hessian without a weight, or when it is called again.
        """
        cross = self.cross
        weight = self.weight
        if cross is None or weight is None:
            raise ValueError("the cross moment was never taken, or is used up")
        self.cross = None
        if _is_tall(weight):
            cross.diagonal().add_(factor.damping)
            target = weight @ factor.inverse_times(cross).T
        else:
            target = factor.inverse_times(cross.addcmul_(weight.T, factor.damping[:, None])).T
        return target.mul_(share).add_(weight, alpha=1 - share)


def _is_tall(weight: torch.Tensor) -> bool:
    """Whether X^T E [in, in] is not larger than X^T E W^T [in, out]."""
    return weight.shape[0] >= weight.shape[1]


def mirror(moment: torch.Tensor) -> None:
    """Copy what lies below the diagonal's tiles to where it belongs above."""
    for tile in _tiles(len(moment)):
        moment[tile, tile.stop :] = moment[tile.stop :, tile].T


def _tiles(columns: int, width: int = TILE) -> list[slice]:
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


@dataclass(frozen=True)
class InverseFactor:
    """The Cholesky factor of an inverse Hessian.

    upper float32 [in, in]: on and above the diagonal the upper Cholesky factor of the inverse of
    the damped second moment, in the order of columns that `order` int64 [in] gives; what lies below
    the diagonal's tiles is not its. damping float32 [in], in plain order: what damping put on the
    diagonal.
    """

    upper: torch.Tensor
    order: torch.Tensor
    damping: torch.Tensor

    def inverse_times(self, right: torch.Tensor) -> torch.Tensor:
        """The inverse of the damped second moment times right float32 [in, n], which may be
        overwritten.
        """
        in_order = torch.equal(self.order, torch.arange(len(self.order)))
        work = right if in_order else right[self.order]
        # The inverse is upper^T upper; of a triangle only the tiles that are not zero are
        # multiplied.
        for tile in _tiles(len(work)):
            work[tile] = self.upper[tile, tile.start :] @ work[tile.start :]
        for tile in reversed(_tiles(len(work))):
            work[tile] = self.upper[: tile.stop, tile].T @ work[: tile.stop]
        return work if in_order else torch.empty_like(work).index_copy_(0, self.order, work)


def inverse_factor_of(moment: torch.Tensor, damp: float, act_order: bool = False) -> InverseFactor:
    """The factor of a second moment float32 [in, in], with `damp` times its mean on the diagonal.
    An input that is always zero stands alone there.

    act_order: columns in order of falling second moment. Raises EdgemedError where it cannot be
    inverted.
    """
    order = moment.diagonal().argsort(descending=True) if act_order else torch.arange(len(moment))
    for times in DAMP_RETRIES:
        ordered = moment[order[:, None], order] if act_order else moment.clone()
        work, damping = _damp(ordered, times * damp)
        if _factor_inverse(work):
            in_place = torch.empty_like(damping).index_copy_(0, order, damping)
            return InverseFactor(work, order, in_place)
    raise _not_invertible(damp)


def _damp(moment: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: (that moment, what was added to its diagonal float32 [in])."""
    diagonal = moment.diagonal()
    damping = (diagonal == 0).float()
    damping += damp * float((diagonal + damping).mean())
    diagonal += damping
    return moment, damping


def _not_invertible(damp: float) -> EdgemedError:
    return EdgemedError(
        f"the calibration inputs give no invertible second moment at damp {damp}",
        "Use more calibration samples, or a larger damp",
    )


def _factor_inverse(work: torch.Tensor) -> bool:
    """In place: a symmetric matrix float32 [n, n] to the upper Cholesky factor of its inverse;
    False where it is not positive definite. Of what lies below the diagonal nothing is read, and
    what lies below the diagonal's tiles stays.

    With H = V V^T, V upper, that factor is V^-1: H is taken apart from its last tile to its first,
    and V inverted from the first to the last. Nearly all of it is products of tiles, which run
    several times as fast as LAPACK's Cholesky, inverse and Cholesky, and no second square is held.
    """
    tiles = _tiles(len(work), FACTOR_TILE)
    for tile in reversed(tiles):
        # torch factors from the first row down; in reversed order that is from the last one up.
        lower, failed = torch.linalg.cholesky_ex(work[tile, tile].flip(0, 1))
        if failed:
            return False
        work[tile, tile] = lower.flip(0, 1)
        above = work[: tile.start, tile]
        above.copy_(
            torch.linalg.solve_triangular(work[tile, tile].T, above, upper=False, left=False)
        )
        # What this tile explains is taken off all that lies above and left of it.
        for part in _tiles(tile.start):
            work[: part.stop, part].addmm_(above[: part.stop], above[part].T, alpha=-1)
    for tile in tiles:
        inverse = torch.linalg.solve_triangular(
            work[tile, tile], torch.eye(tile.stop - tile.start), upper=True
        )
        above = work[: tile.start, tile] @ inverse
        for part in _tiles(tile.start):
            work[part, tile] = -(work[part, part.start : tile.start] @ above[part.start :])
        work[tile, tile] = inverse
        # Zeros below the diagonal, down to the end of the TILE that the products read.
        work[tile.stop : tile.start - tile.start % TILE + TILE, tile] = 0
    return True


def solve(
    weight: torch.Tensor,
    moment: torch.Tensor,
    bits: int,
    group: int,
    damp: float,
    act_order: bool = False,
    clip: bool = False,
) -> Solution:
    """`quantize_columns` with the second moment [in, in] of the matrix' inputs. Raises EdgemedError
    where that cannot be inverted.
    """
    factor = inverse_factor_of(moment, damp, act_order)
    return quantize_columns(weight, factor, bits, group, act_order, clip)


def sweep_columns(
    work: torch.Tensor, upper: torch.Tensor, nearest: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Quantize columns one by one, each after the errors of those before it have arrived. Returns
    what is left for the columns behind these: errors float32 [columns, out].

    work float32 [columns, out] is used up; upper float32 [columns, columns]: their part of the
    inverse factor; nearest(column, its numbers [out]) quantizes them.
    """
    errors = torch.empty_like(work)
    for column, values in enumerate(work):
        start = column - column % SUB_BLOCK
        if column == start > 0:
            # The errors of the sub-block that has just ended reach all that follows in a product.
            ended = slice(start - SUB_BLOCK, start)
            work[start:].addmm_(upper[ended, start:].T, errors[ended], alpha=-1)
        errors[column] = (values - nearest(column, values)) / upper[column, column]
        later = slice(column + 1, start + SUB_BLOCK)
        work[later].addr_(upper[column, later], errors[column], alpha=-1)
    return errors


def quantize_columns(
    weight: torch.Tensor,
    factor: InverseFactor,
    bits: int,
    group: int,
    act_order: bool = False,
    clip: bool = False,
) -> Solution:
    """Integers for weight float32 [out, in], given the inverse factor of the second moment of its
    inputs; group divides in.

    act_order: the factor's columns are in order of falling second moment. Scales then belong to the
    original groups and are fixed beforehand, so column i keeps group i // group and every engine
    can carry the integers. Otherwise a group's scale is taken when it is reached, after the errors
    of earlier columns have arrived. A column whose input is always zero is quantized by RTN. clip:
    scales by grids.clipped_scale, a column's error weighed as GPTQ weighs it, by 1 / upper[i, i]^2
    (what the later columns cannot make good).
    """
    rows, columns = weight.shape
    order = factor.order
    upper = factor.upper
    importance = torch.empty(columns)
    importance[order] = upper.diagonal() ** -2
    # Transposed: the loop walks over columns, which are then contiguous.
    work = weight.T[order].contiguous()
    q = torch.empty(columns, rows, dtype=torch.uint8)
    scales_are_fixed = act_order or group > BLOCK
    if scales_are_fixed:
        scales = rtn(weight, bits, group, clip, importance)[1].T.contiguous()
    else:
        scales = torch.empty(columns // group, rows)
    groups = (order // group).tolist()
    zero = 1 << (bits - 1)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)

        def nearest(within: int, values: torch.Tensor, start: int = start) -> torch.Tensor:
            column = start + within
            if not scales_are_fixed and column % group == 0:
                reached = work[column : column + group].T.contiguous()
                scales[groups[column]] = (
                    clipped_scale(reached, bits, importance[column : column + group])
                    if clip
                    else scale_of(reached, bits)
                )
            scale = scales[groups[column]]
            integer = (values / scale).round_().clamp_(-zero, zero - 1)
            q[column] = integer + zero
            return integer * scale

        errors = sweep_columns(work[start:end], upper[start:end, start:end], nearest)
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(columns)
    return Solution(q[inverse].T.contiguous(), scales.T.contiguous())


def output_error(weight: torch.Tensor, quantized: torch.Tensor, moment: torch.Tensor) -> float:
    """As Hessian.output_error, of inputs of which only the second moment [in, in] is left."""
    diagonal = [moment[tile, tile] for tile in _tiles(len(moment))]
    error = _energy(weight - quantized, moment, diagonal)
    return error / max(_energy(weight, moment, diagonal), 1e-30)


def _energy(weight: torch.Tensor, lower: torch.Tensor, diagonal: list[torch.Tensor]) -> float:
    """The sum over rows w of w H w^T. H is symmetric, `diagonal` are its tiles there, and of the
    rest only what lies below them is read.
    """
    total = 0.0
    for tile, block in zip(_tiles(len(lower)), diagonal, strict=True):
        product = weight[:, tile.stop :] @ lower[tile.stop :, tile]
        total += float(product.addmm_(weight[:, tile], block, beta=2).mul_(weight[:, tile]).sum())
    return total
