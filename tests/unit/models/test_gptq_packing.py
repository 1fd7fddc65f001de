"""Integers of every width survive packing into 32-bit words, along either axis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgemed.models.gptq_packing import pack, stride, unpack

WIDTHS = st.integers(2, 8)


def as_integer(words: np.ndarray) -> int:
    """The words as one long number, the first word lowest."""
    return int.from_bytes(words.astype("<i4").tobytes(), "little")


@given(
    bits=WIDTHS,
    blocks=st.integers(1, 4),
    others=st.integers(1, 5),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_undoes_pack(bits: int, blocks: int, others: int, axis: int, seed: int) -> None:
    count, words = stride(bits)
    shape = (blocks * count, others) if axis == 0 else (others, blocks * count)
    generator = np.random.default_rng(seed)
    values = torch.tensor(generator.integers(0, 1 << bits, shape, dtype=np.uint8))
    packed = pack(values, bits, axis)
    assert packed.dtype == torch.int32
    assert packed.shape[axis] == blocks * words
    assert packed.shape[1 - axis] == others
    unpacked = unpack(packed, bits, axis)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, values)


@given(bits=WIDTHS, blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_packed_words_are_one_stream_of_bits(bits: int, blocks: int, seed: int) -> None:
    count, _ = stride(bits)
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 1 << bits, blocks * count, dtype=np.uint8)
    packed = pack(torch.tensor(values), bits, 0).numpy()
    expected = sum(int(value) << bits * place for place, value in enumerate(values))
    assert as_integer(packed) == expected


@given(bits=WIDTHS, blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_any_words_unpack_and_pack_to_themselves(bits: int, blocks: int, seed: int) -> None:
    _, words = stride(bits)
    generator = np.random.default_rng(seed)
    numbers = generator.integers(-(2**31), 2**31, blocks * words, dtype=np.int64)
    packed = torch.tensor(numbers.astype(np.int32))
    assert torch.equal(pack(unpack(packed, bits, 0), bits, 0), packed)


@given(bits=WIDTHS)
def test_stride_fills_whole_words_and_no_fewer_do(bits: int) -> None:
    count, words = stride(bits)
    assert count * bits == words * 32
    assert not [fewer for fewer in range(1, count) if fewer * bits % 32 == 0]
