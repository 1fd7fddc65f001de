"""Blocks of llama.cpp's types against the gguf package's own reading of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from edgemed.gguf.preserved_integers import carried, carried_type
from edgemed.gguf.writer import Encoder, Tensor
from edgemed.models.weights import Packed
from edgemed.quantization.grids import ggml_q8

SEEDS = st.integers(0, 2**32 - 1)
WIDE = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
NARROW = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def read(kind: str, data: np.ndarray) -> np.ndarray:
    """Bytes of a type -> float32, as the gguf package reads them."""
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def columns_of(kind: str, blocks: int) -> int:
    return blocks * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    seed=SEEDS,
)
def test_carried_integers_are_read_back(
    bits: int, rows: int, groups: int, group: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    integers = generator.integers(0, 1 << bits, (rows, groups * group), dtype=np.uint8)
    scales = generator.uniform(1e-3, 2, (rows, groups)).astype(np.float16).astype(np.float32)
    matrix = Packed(
        q=torch.tensor(integers),
        scales=torch.tensor(scales),
        zeros=torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8),
        g_idx=None,
        bits=bits,
        group=group,
        bias=None,
    )
    data = carried(matrix, "m", 8 if bits == 8 else 4)
    assert (read(carried_type(bits), data) == matrix.dense().numpy()).all()


@given(rows=st.integers(1, 3), blocks=st.integers(1, 4), seed=SEEDS)
def test_eight_bit_grid_is_ggmls(rows: int, blocks: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(0, 1, (rows, blocks * 32)).astype(np.float32)
    q, scales = ggml_q8(weight)
    with Encoder(1) as encoder:
        data = encoder.start(Tensor("m", weight.shape, "Q8_0", lambda: weight), weight)()
    own = (q.astype(np.float32) - 128) * scales.repeat(32, axis=1)
    assert (own == read("Q8_0", data.reshape(rows, -1))).all()


@pytest.mark.parametrize("kind", NARROW + WIDE)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 2), seed=SEEDS)
def test_blocks_are_expanded_as_written(kind: str, rows: int, blocks: int, seed: int) -> None:
    shape = (rows, columns_of(kind, blocks))
    weight = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    with Encoder(1) as encoder:
        data = encoder.start(Tensor("m", shape, kind, lambda: weight), weight)()
        data = data.reshape(rows, -1)
        expanded = encoder.expand(kind, data)
    assert np.allclose(expanded, read(kind, data), rtol=1e-6, atol=1e-6)
    # Nothing lies further from its weight than the coarsest type's own step.
    assert np.abs(expanded - weight).max() < np.abs(weight).max()
