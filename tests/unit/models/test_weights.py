"""Integers and their layouts: packing as AutoGPTQ does, rounding, GGUF's Q8_0, and how packed
matrices are regrouped for engines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_model

torch = pytest.importorskip("torch")

from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Writer, narrowed, open_checkpoint
from edgemed.models.gptq_packing import pack, unpack
from edgemed.models.weights import CanonicalWeights, Packed
from edgemed.quantization.grids import block_ints, ggml_q8, rtn, scale_of


def test_packing_puts_the_first_value_in_the_lowest_bits() -> None:
    values = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    assert pack(values, 4, 0).item() == 0x76543210
    assert pack(values.reshape(1, 8), 8, 1).tolist() == [[0x03020100, 0x07060504]]
    # The highest bit makes the word negative.
    assert pack(torch.full((8, 1), 15, dtype=torch.uint8), 4, 0).item() == -1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_unpack_is_the_inverse(bits: int, axis: int) -> None:
    values = torch.randint(
        1 << bits, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    packed = pack(values, bits, axis)
    assert packed.dtype == torch.int32
    assert packed.shape[axis] == values.shape[axis] * bits // 32
    assert (unpack(packed, bits, axis) == values).all()


def test_rounding_error_is_half_a_step_at_most_inside_the_grid() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        q, scales = rtn(weight, bits, 32)
        dense = (q.float() - (1 << bits - 1)) * scales.repeat_interleave(32, 1)
        step = scales.repeat_interleave(32, 1)
        inside = weight <= step * ((1 << bits - 1) - 1)
        assert ((weight - dense).abs()[inside] <= step[inside] / 2 * 1.001).all()
        assert inside.float().mean() > 0.9
        assert (scales == scales.half().float()).all()
    with pytest.raises(EdgemedError, match="group of 48 does not divide a row of 128"):
        rtn(weight, 4, 48)


def test_a_group_of_zeros_keeps_a_scale() -> None:
    q, scales = rtn(torch.zeros(2, 64), 4, 32)
    assert (scales > 0).all()
    assert (q == 8).all()
    assert scale_of(torch.full((1, 4), 1e-12), 4).item() > 0


def test_ggml_q8_equals_the_gguf_packages() -> None:
    gguf = pytest.importorskip("gguf")
    weight = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32)
    weight[0, :32] = 0
    q, scales = ggml_q8(weight)
    raw = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0).reshape(7, 3, 34)
    assert (raw[..., :2].copy().view(np.float16)[..., 0].astype(np.float32) == scales).all()
    assert (raw[..., 2:].view(np.int8).astype(np.int16) + 128 == q.reshape(7, 3, 32)).all()


@pytest.mark.parametrize(
    ("group", "block"), [(256, 128), (128, 128), (64, 64), (96, 32), (768, 128)]
)
def test_blocks_are_powers_of_two_that_fit_the_group(group: int, block: int) -> None:
    q = torch.randint(16, (4, 768), dtype=torch.uint8)
    scales = torch.rand(4, 768 // group) + 0.1
    packed = Packed(q, scales, torch.full(scales.shape, 8, dtype=torch.uint8), None, 4, group, None)
    ints = block_ints(packed)
    assert ints.block == block
    assert ints.zeros is None
    assert np.allclose(
        (ints.q.astype(np.float32) - 8) * ints.scales.repeat(block, 1), packed.dense().numpy()
    )


def test_narrowing_refuses_what_becomes_infinite() -> None:
    assert narrowed("w", torch.tensor([65504.0]), "float16").item() == 65504
    with pytest.raises(EdgemedError, match="'w': 7e.04 does not fit into float16"):
        narrowed("w", torch.tensor([70000.0]), "float16")


def test_writer_splits_into_shards_that_transformers_layout_expects(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(5)}
    writer = Writer(tmp_path, {"model_type": "x"}, shard_bytes=900)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == set(tensors)
    assert all((found.read(name) == tensor).all() for name, tensor in tensors.items())


def test_sum_that_overflows_is_no_infinite_weight(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {})
    writer.add("big", torch.full((4096,), 3e38))
    writer.close()
    assert open_checkpoint(tmp_path).read("big").max() < float("inf")


def test_weights_are_read_in_one_layout(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    weights = CanonicalWeights(checkpoint)
    for name, part in weights.parts.items():
        found = (
            weights.table(name)
            if part.kind == "table"
            else weights.norm(name)[0]
            if part.kind == "norm"
            else weights.matrix(name).dense()
        )
        assert tuple(found.shape) == part.shape
        assert found.dtype == torch.float32
    assert (
        weights.matrix("layers.1.up").weight == checkpoint.read("transformer.h.1.mlp.c_fc.weight").T
    ).all()


def test_quantized_by_another_method_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(EdgemedError, match="quantized with 'awq'.*Known: gptq"):
        CanonicalWeights(open_checkpoint(path))
