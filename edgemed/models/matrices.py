"""The two forms a matrix is read in: floats, or small integers with their scales.

Targets that can compute with integers take them as they are; everything else asks for the floats
they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dense:
    """weight [out, in] and bias [out] or None, float32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def dense(self) -> torch.Tensor:
        """The weight [out, in], float32."""
        return self.weight


@dataclass(frozen=True)
class Packed:
    """A quantized matrix: weight = (q - zeros[group]) * scales[group].

    q uint8 [out, in], scales float32 [out, groups], zeros uint8 [out, groups], g_idx int32 [in]
    (the group of each input; None where it is simply in // group), bias float32 [out] or None.
    """

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor | None
    bits: int
    group: int
    bias: torch.Tensor | None

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the range."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def dense(self) -> torch.Tensor:
        """The weight [out, in] that the integers stand for, float32."""
        torch = need("torch", "build")
        if self.g_idx is not None:
            index = self.g_idx.long()
        else:
            index = torch.arange(self.q.shape[1]) // self.group
        return (self.q.float() - self.zeros.float()[:, index]) * self.scales[:, index]


def joined(modules: Sequence[Dense | Packed], name: str) -> Dense | Packed:
    """Matrices with the same inputs as one, along the output axis. A bias that only some of them
    have is zero in the others.

    Raises EdgemedError where packed ones are packed differently.
    """
    torch = need("torch", "build")
    bias = _joined_bias(modules)
    dense = [module for module in modules if isinstance(module, Dense)]
    packed = [module for module in modules if isinstance(module, Packed)]
    if not packed:
        return Dense(torch.cat([module.weight for module in dense]), bias)
    first = packed[0]
    if dense or not all(_packed_alike(module, first) for module in packed):
        raise EdgemedError(
            f"{name}: its modules are quantized in different ways",
            "Quantize them alike, or start from the float checkpoint",
        )
    return Packed(
        q=torch.cat([module.q for module in packed]),
        scales=torch.cat([module.scales for module in packed]),
        zeros=torch.cat([module.zeros for module in packed]),
        g_idx=first.g_idx,
        bits=first.bits,
        group=first.group,
        bias=bias,
    )


def _joined_bias(modules: Sequence[Dense | Packed]) -> torch.Tensor | None:
    torch = need("torch", "build")
    if all(module.bias is None for module in modules):
        return None
    biases = []
    for module in modules:
        rows = len(module.q if isinstance(module, Packed) else module.weight)
        biases.append(torch.zeros(rows) if module.bias is None else module.bias)
    return torch.cat(biases)


def _packed_alike(module: Packed, other: Packed) -> bool:
    torch = need("torch", "build")
    if (module.bits, module.group) != (other.bits, other.group):
        return False
    if module.g_idx is None or other.g_idx is None:
        return module.g_idx is other.g_idx
    return torch.equal(module.g_idx, other.g_idx)
