"""Small integers in 32-bit words, as AutoGPTQ's layout packs them.

Three-bit values cross the words' borders, which is why packing has a file of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgemed.errors import need

if TYPE_CHECKING:
    import torch


def unpack(packed: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """int32 words -> uint8 values along `axis`: the words are one stream of bits, lowest first
    (AutoGPTQ's layout; 32 values of 3 bits fill 3 words).
    """
    torch = need("torch", "build")
    values, words = stride(bits)
    moved = packed.movedim(axis, 0)
    grouped = moved.reshape(-1, words, *moved.shape[1:]).to(torch.int64) & 0xFFFFFFFF
    unpacked = torch.empty((grouped.shape[0], values, *moved.shape[1:]), dtype=torch.uint8)
    # Value i lies at the bits from i * bits on. It may begin in one word and end in the next.
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = grouped[:, word] >> shift
        if shift + bits > 32:
            value |= grouped[:, word + 1] << (32 - shift)
        unpacked[:, i] = value & ((1 << bits) - 1)
    return unpacked.reshape(-1, *moved.shape[1:]).movedim(0, axis).contiguous()


def pack(values: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The inverse of unpack: uint8 values -> int32 words along `axis`."""
    torch = need("torch", "build")
    count, words = stride(bits)
    moved = values.movedim(axis, 0)
    grouped = moved.reshape(-1, count, *moved.shape[1:])
    packed = torch.zeros((grouped.shape[0], words, *moved.shape[1:]), dtype=torch.int64)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        value = grouped[:, i].to(torch.int64)
        packed[:, word] |= value << shift & 0xFFFFFFFF
        if shift + bits > 32:
            packed[:, word + 1] |= value >> (32 - shift)
    # The words are unsigned, torch's int32 is not: those of 2^31 and above become negative.
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return packed.reshape(-1, *moved.shape[1:]).movedim(0, axis).contiguous()


def stride(bits: int) -> tuple[int, int]:
    """(values, words): the fewest values that fill whole 32-bit words."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common
