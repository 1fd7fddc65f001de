"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounds a matrix column by column and moves each
column's error into the later ones.

Pure tensor arithmetic, apart from files and families, so that it can be tested against exact
answers and used by any step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemed.errors import EdgemedError, need
from edgemed.quantization.grids import clipped_scale, rtn, scale_of

if TYPE_CHECKING:
    import torch

# Columns whose errors are applied to the rest of the matrix in one product; a multiple of every
# group but -1.
BLOCK = 128
# Within a block: columns whose errors reach each other one by one, the rest of the block in a
# product; divides every group but -1.
STRIP = 32
# Columns of one product where a square is known to be symmetric or a triangle.
PANEL = 1024
# Rounding can leave a nearly singular moment indefinite in float32: then damp ten times, a hundred
# times as much.
DAMPINGS = (1, 10, 100)


@dataclass(frozen=True)
class Solution:
    """q uint8 [out, in] with zero at 2^(bits-1), scales float32 [out, in/group] that float16 holds
    exactly.
    """

    q: torch.Tensor
    scales: torch.Tensor

    def dense(self, bits: int) -> torch.Tensor:
        """The weights the integers stand for, float32 [out, in]."""
        found = self.q.float().sub_(1 << (bits - 1))
        found.view(*self.scales.shape, -1).mul_(self.scales[..., None])
        return found


class Hessian:
    """The second moment 2 X^T X / n of a matrix's inputs, `moment` float32 [in, in], kept as a
    running mean over batches.

    weight: the matrix [out, in] whose inputs shall be corrected; then `add` is also given E, the
    inputs the same tokens have where nothing was rounded.
    """

    def __init__(self, columns: int, weight: torch.Tensor | None = None):
        torch = need("torch", "build")
        self.lower = torch.zeros(columns, columns)
        self.rows = 0
        self.weight = weight
        self.diagonal: list[torch.Tensor] | None = None
        # 2 X^T E / n, or times W^T, token by token: whichever is smaller.
        self.joint = None if weight is None else torch.zeros(columns, min(columns, weight.shape[0]))

    def add(
        self,
        x: torch.Tensor,
        exact: torch.Tensor | None = None,
        product: torch.Tensor | None = None,
    ) -> None:
        """x, exact float32 [..., in]; exact where there is a weight, and where it is known already
        its product with W^T, float32 [..., out].
        """
        flat = x.reshape(-1, self.lower.shape[0])
        if not len(flat):
            return
        rows = self.rows + flat.shape[0]
        share = {"beta": self.rows / rows, "alpha": 2 / rows}
        for panel in _panels(flat.shape[1]):
            # It is symmetric: only what lies at or below the diagonal's panels is summed up.
            self.lower[panel.start :, panel].addmm_(
                flat[:, panel.start :].T, flat[:, panel], **share
            )
        if self.joint is not None:
            exact = exact.reshape(flat.shape)
            if not self._square():
                exact = exact @ self.weight.T if product is None else product.reshape(len(flat), -1)
            self.joint.addmm_(flat.T, exact, **share)
        self.rows = rows

    def _square(self) -> bool:
        return self.weight.shape[0] >= self.weight.shape[1]

    @property
    def moment(self) -> torch.Tensor:
        """The whole matrix, what lies above the diagonal's panels filled in."""
        mirror(self.lower)
        return self.lower

    def root(self, damp: float, act_order: bool = False) -> Root:
        """As `root_of`. In plain order it takes the half of the square above the diagonal's panels,
        so that no second one is held: `moment` is gone then.
        """
        if act_order:
            return root_of(self.moment, damp, True)
        torch = need("torch", "build")
        self.diagonal = [self.lower[panel, panel].clone() for panel in _panels(len(self.lower))]
        for times in DAMPINGS:
            for panel, block in zip(_panels(len(self.lower)), self.diagonal, strict=True):
                self.lower[panel, panel] = block
            work, added = _damped(self.moment, times * damp)
            if _root(work):
                return Root(work, torch.arange(len(work)), added)
        raise _singular(damp)

    def output_error(self, weight: torch.Tensor, rounded: torch.Tensor) -> float:
        """|X (W - W')^T|^2 / |X W^T|^2: the share of a matrix's output over these inputs that
        rounding changed; before `root` or after it.
        """
        diagonal = self.diagonal or [self.lower[panel, panel] for panel in _panels(len(self.lower))]
        return _energy(weight - rounded, self.lower, diagonal) / max(
            _energy(weight, self.lower, diagonal), 1e-30
        )

    def corrected(self, root: Root, share: float) -> torch.Tensor:
        """The weights [out, in] that GPTQ shall round instead of `weight` W, so that the error its
        inputs already carry is made good too; asked for once.

        Of all V, the one whose outputs X V^T are nearest to those of the exact inputs, E W^T,
        damping holding it to W, is (H + damp)^-1 (X^T E + damp) W^T, transposed (H = X^T X); W goes
        the way to it by `share`, because calibration text is finite. This is GPTAQ's target (Li et
        al. 2025, arXiv 2504.02692) in closed form, with QEP's share (Arai and Ichikawa 2025, arXiv
        2504.09629).
        """
        joint = self.joint
        self.joint = None
        if self._square():
            joint.diagonal().add_(root.added)
            found = self.weight @ root.inverse_times(joint).T
        else:
            found = root.inverse_times(joint.addcmul_(self.weight.T, root.added[:, None])).T
        return found.mul_(share).add_(self.weight, alpha=1 - share)


def mirror(moment: torch.Tensor) -> None:
    """Copy what lies below the diagonal's panels to where it belongs above."""
    for panel in _panels(len(moment)):
        moment[panel, panel.stop :] = moment[panel.stop :, panel].T


def _panels(columns: int, width: int = PANEL) -> list[slice]:
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


@dataclass(frozen=True)
class Root:
    """upper float32 [in, in]: on and above the diagonal the upper Cholesky factor of the inverse of
    the damped second moment, in the order of columns that `order` int64 [in] gives. What lies below
    the diagonal's panels is not its. added float32 [in], in plain order: what damping put on the
    diagonal.
    """

    upper: torch.Tensor
    order: torch.Tensor
    added: torch.Tensor

    def inverse_times(self, right: torch.Tensor) -> torch.Tensor:
        """The damped second moment's inverse times right float32 [in, n], which may be
        overwritten.
        """
        torch = need("torch", "build")
        plain = torch.equal(self.order, torch.arange(len(self.order)))
        work = right if plain else right[self.order]
        # The inverse is upper^T upper; of a triangle only the panels that are not zero are
        # multiplied.
        for panel in _panels(len(work)):
            work[panel] = self.upper[panel, panel.start :] @ work[panel.start :]
        for panel in reversed(_panels(len(work))):
            work[panel] = self.upper[: panel.stop, panel].T @ work[: panel.stop]
        return work if plain else torch.empty_like(work).index_copy_(0, self.order, work)


def root_of(moment: torch.Tensor, damp: float, act_order: bool = False) -> Root:
    """Of a second moment float32 [in, in], with `damp` times its mean on the diagonal; an input
    that is always zero stands alone there.

    act_order: columns in order of falling second moment. Raises EdgemedError where it cannot be
    inverted.
    """
    torch = need("torch", "build")
    order = moment.diagonal().argsort(descending=True) if act_order else torch.arange(len(moment))
    for times in DAMPINGS:
        work, added = _damped(
            moment[order[:, None], order] if act_order else moment.clone(), times * damp
        )
        if _root(work):
            return Root(work, order, torch.empty_like(added).index_copy_(0, order, added))
    raise _singular(damp)


def _damped(moment: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: (that moment, what was added to its diagonal float32 [in])."""
    diagonal = moment.diagonal()
    added = (diagonal == 0).float()
    added += damp * float((diagonal + added).mean())
    diagonal += added
    return moment, added


def _singular(damp: float) -> EdgemedError:
    return EdgemedError(
        f"the calibration inputs give no invertible second moment at damp {damp}",
        "Use more calibration samples, or a larger damp",
    )


def _root(work: torch.Tensor) -> bool:
    """In place: a symmetric matrix float32 [n, n] to the upper Cholesky factor of its inverse;
    False where it is not positive definite. Of what lies below the diagonal nothing is read, and
    what lies below the diagonal's panels stays.

    With H = V V^T, V upper, that factor is V^-1: H is taken apart from its last panel to its first,
    and V inverted from the first to the last. Nearly all of it is products of panels, which run
    several times as fast as LAPACK's Cholesky, inverse and Cholesky, and no second square is held.
    """
    torch = need("torch", "build")
    panels = _panels(len(work), 256)
    for panel in reversed(panels):
        lower, failed = torch.linalg.cholesky_ex(work[panel, panel].flip(0, 1))
        if failed:
            return False
        work[panel, panel] = lower.flip(0, 1)
        above = work[: panel.start, panel]
        above.copy_(
            torch.linalg.solve_triangular(work[panel, panel].T, above, upper=False, left=False)
        )
        for part in _panels(panel.start):
            work[: part.stop, part].addmm_(above[: part.stop], above[part].T, alpha=-1)
    for panel in panels:
        inverse = torch.linalg.solve_triangular(
            work[panel, panel], torch.eye(panel.stop - panel.start), upper=True
        )
        above = work[: panel.start, panel] @ inverse
        for part in _panels(panel.start):
            work[part, panel] = -(work[part, part.start : panel.start] @ above[part.start :])
        work[panel, panel] = inverse
        work[panel.stop : panel.start - panel.start % PANEL + PANEL, panel] = 0
    return True


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group: int,
    damp: float,
    act_order: bool = False,
    clip: bool = False,
) -> Solution:
    """`round_columns` with the second moment [in, in] of the matrix's inputs; raises EdgemedError
    where that cannot be inverted.
    """
    return round_columns(weight, root_of(hessian, damp, act_order), bits, group, act_order, clip)


def swept(
    work: torch.Tensor, upper: torch.Tensor, nearest: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Round columns one by one, each after the errors of those before it have arrived; what is left
    for columns behind these: errors float32 [columns, out].

    work float32 [columns, out] is used up, upper float32 [columns, columns] their part of the root;
    nearest(column, its numbers [out]) rounds them.
    """
    errors = need("torch", "build").empty_like(work)
    for column, values in enumerate(work):
        strip = column - column % STRIP
        if column == strip > 0:
            work[strip:].addmm_(
                upper[strip - STRIP : strip, strip:].T, errors[strip - STRIP : strip], alpha=-1
            )
        errors[column] = (values - nearest(column, values)) / upper[column, column]
        later = slice(column + 1, strip + STRIP)
        work[later].addr_(upper[column, later], errors[column], alpha=-1)
    return errors


def round_columns(
    weight: torch.Tensor,
    root: Root,
    bits: int,
    group: int,
    act_order: bool = False,
    clip: bool = False,
) -> Solution:
    """Integers for weight float32 [out, in] given the root of the second moment of its inputs;
    group divides in.

    act_order: the root's columns are in order of falling second moment. Scales then belong to the
    original groups and are fixed beforehand, so column i keeps group i // group and every engine
    can carry the integers. Otherwise a group's scale is taken when it is reached, after the errors
    of earlier columns have arrived. A column whose input is always zero is rounded to nearest.
    clip: scales by grid.clipped_scale, a column's error weighed as GPTQ weighs it, by 1 / upper[i,
    i]^2 (what the later columns cannot make good).
    """
    torch = need("torch", "build")
    rows, columns = weight.shape
    order = root.order
    upper = root.upper
    importance = torch.empty(columns)
    importance[order] = upper.diagonal() ** -2
    # Transposed: the loop walks over columns, which are then contiguous.
    work = weight.T[order].contiguous()
    q = torch.empty(columns, rows, dtype=torch.uint8)
    fixed = act_order or group > BLOCK
    scales = (
        rtn(weight, bits, group, clip, importance)[1].T.contiguous()
        if fixed
        else torch.empty(columns // group, rows)
    )
    groups = (order // group).tolist()
    zero = 1 << (bits - 1)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)

        def nearest(within: int, values: torch.Tensor, start: int = start) -> torch.Tensor:
            column = start + within
            if not fixed and column % group == 0:
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

        work[end:].addmm_(
            upper[start:end, end:].T,
            swept(work[start:end], upper[start:end, start:end], nearest),
            alpha=-1,
        )
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(columns)
    return Solution(q[inverse].T.contiguous(), scales.T.contiguous())


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """As Hessian.output_error, of inputs of which only the second moment [in, in] is left."""
    diagonal = [moment[panel, panel] for panel in _panels(len(moment))]
    return _energy(weight - rounded, moment, diagonal) / max(
        _energy(weight, moment, diagonal), 1e-30
    )


def _energy(weight: torch.Tensor, lower: torch.Tensor, diagonal: list[torch.Tensor]) -> float:
    """The sum over rows w of w H w^T; H is symmetric, `diagonal` the panels there, and of the rest
    only what lies below them is read.
    """
    total = 0.0
    for panel, block in zip(_panels(len(lower)), diagonal, strict=True):
        product = weight[:, panel.stop :] @ lower[panel.stop :, panel]
        total += float(product.addmm_(weight[:, panel], block, beta=2).mul_(weight[:, panel]).sum())
    return total
