"""The ONNX Runtime target against the torch decoder: every precision, both heads, GPTQ checkpoints
bit for bit, and a cache that is never copied.

The expected scores of a quantized engine are those of its own integers expanded to float32, so a
wrong scale, zero or order of groups shows at once, while rounding itself does not.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTEXT, on_q8_grid, tokens, write_model
from gptq_checkpoints import old_checkpoint

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgemed.engines.engine import Engine, export
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights, Dense, Packed
from edgemed.onnx import ort_session
from edgemed.quantization.grids import rtn
from edgemed.steps import quantize
from edgemed.targets.onnx import Params

TOKENS = tokens(100)


def expected(weights: CanonicalWeights | Path, ids: list[int] = TOKENS) -> np.ndarray:
    weights = (
        weights
        if isinstance(weights, CanonicalWeights)
        else CanonicalWeights(open_checkpoint(weights))
    )
    return logits(weights, torch.tensor([ids]))[0].numpy()


def scores(engine: Engine, ids: list[int] = TOKENS) -> np.ndarray:
    session = engine.open(1)
    try:
        return session.prefill(ids, every=True).copy()
    finally:
        session.close()


class Rounded(CanonicalWeights):
    """A checkpoint as an int8/int4 engine sees it: matrices rounded to nearest, float16 tables,
    output matrix on the Q8_0 grid.
    """

    bits = 4
    group = 32

    def table(self, name: str) -> torch.Tensor:
        return super().table(name).half().float()

    def matrix(self, name: str) -> Dense:
        matrix = super().matrix(name)
        weight = matrix.dense()
        if name == "lm_head":
            weight = on_q8_grid(weight)
        elif isinstance(matrix, Dense):
            q, scale = rtn(weight, self.bits, self.group)
            weight = (q.float() - (1 << self.bits - 1)) * scale.repeat_interleave(self.group, 1)
        return Dense(weight, matrix.bias)


def initializers(engine: Engine) -> dict[str, np.ndarray]:
    model = onnx.load(engine.path / "model.onnx")
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor, str(engine.path))
        for tensor in model.graph.initializer
    }


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 0.1)])
def test_float_parity(tmp_path: Path, precision: str, bound: float, scaled: bool) -> None:
    checkpoint = open_checkpoint(
        write_model(tmp_path / "model", scale_attn_by_inverse_layer_idx=scaled)
    )
    right = expected(CanonicalWeights(checkpoint))
    assert (
        np.abs(
            scores(export(checkpoint, "onnx", Params(precision), tmp_path / "engine")) - right
        ).max()
        < bound
    )
    other = replace(
        checkpoint, config={**checkpoint.config, "scale_attn_by_inverse_layer_idx": not scaled}
    )
    assert np.abs(expected(CanonicalWeights(other)) - right).max() > 0.2, (
        "the scale by layer makes no difference here, so nothing was tested"
    )


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("group", [32, 64])
def test_rounded_parity(model: Path, tmp_path: Path, precision: str, bits: int, group: int) -> None:
    weights = Rounded(open_checkpoint(model))
    weights.bits = bits
    weights.group = group
    right = expected(weights)
    found = scores(
        export(
            weights.checkpoint,
            "onnx",
            Params(precision, group, accuracy_level=1),
            tmp_path / "engine",
        )
    )
    assert np.abs(found - right).max() < 1e-3
    # With int8 activations the same integers still agree closely: a mistake of layout would not.
    quick = scores(
        export(
            weights.checkpoint,
            "onnx",
            Params(precision, group, accuracy_level=4),
            tmp_path / "quick",
        )
    )
    assert np.abs(quick - right).max() < 0.1 * np.abs(right).max()
    assert np.corrcoef(quick.ravel(), right.ravel())[0, 1] > 0.995


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("packed")
    quantize.run(open_checkpoint(model), out, quantize.Params("rtn", 4, 32))
    return open_checkpoint(out)


class Carried(Rounded):
    """A packed checkpoint as its engine sees it."""


def test_packed_integers_are_carried_bit_for_bit(packed: Checkpoint, tmp_path: Path) -> None:
    engine = export(packed, "onnx", Params(accuracy_level=1), tmp_path / "engine")
    weights = CanonicalWeights(packed)
    stored = initializers(engine)
    for n in range(weights.decoder.layers):
        for name in weights.decoder.matrices(n):
            matrix = weights.matrix(f"layers.{n}.{name}")
            assert isinstance(matrix, Packed)
            nibbles = stored[f"layers.{n}.{name}.q"]
            q = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(matrix.q.shape)
            assert (q == matrix.q.numpy()).all()
            assert (stored[f"layers.{n}.{name}.scales"] == matrix.scales.numpy()).all()
    assert np.abs(scores(engine) - expected(Carried(packed))).max() < 1e-3
    assert engine.precision == "int4 g32"


@pytest.mark.parametrize("group", [64, -1])
def test_eight_bits_and_whole_rows(model: Path, tmp_path: Path, group: int) -> None:
    (tmp_path / "packed").mkdir()
    quantize.run(open_checkpoint(model), tmp_path / "packed", quantize.Params("rtn", 8, group))
    checkpoint = open_checkpoint(tmp_path / "packed")
    engine = export(checkpoint, "onnx", Params(accuracy_level=1), tmp_path / "engine")
    assert np.abs(scores(engine) - expected(Carried(checkpoint))).max() < 1e-3
    with pytest.raises(EdgemedError, match="holds 8-bit integers and precision int4 asks for 4"):
        export(checkpoint, "onnx", Params("int4"), tmp_path / "other")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("asymmetric", "act_order"), [(True, False), (False, True), (True, True)])
def test_old_checkpoints(
    model: Path, tmp_path: Path, bits: int, asymmetric: bool, act_order: bool
) -> None:
    checkpoint = old_checkpoint(model, tmp_path / "old", bits, asymmetric, act_order)
    matrix = CanonicalWeights(checkpoint).matrix("layers.0.qkv")
    assert matrix.symmetric is not asymmetric
    assert (matrix.g_idx is not None) is act_order
    engine = export(checkpoint, "onnx", Params(accuracy_level=1), tmp_path / "engine")
    assert np.abs(scores(engine) - expected(Carried(checkpoint))).max() < 2e-3


@pytest.mark.parametrize("classes", [3, 1])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_heads(model: Path, tmp_path: Path, classes: int, precision: str) -> None:
    from conftest import rewrite

    head = torch.empty(classes, 64).normal_(generator=torch.Generator().manual_seed(1))
    checkpoint = open_checkpoint(
        rewrite(model, tmp_path / "head", lambda tensors: tensors | {"score.weight": head})
    )
    engine = export(
        checkpoint, "onnx", Params(precision, 32, accuracy_level=1), tmp_path / "engine"
    )
    assert (engine.head, engine.width) == (("classes", 3) if classes == 3 else ("choice", 1))
    weights = CanonicalWeights(checkpoint) if precision == "fp32" else Rounded(checkpoint)
    if precision == "int4":
        plain = weights.matrix
        weights.matrix = lambda name: (
            CanonicalWeights.matrix(weights, name) if name == "head" else plain(name)
        )
    session = engine.open(1)
    right = expected(weights)
    found = session.prefill(TOKENS)
    assert found.shape == (1, classes)
    assert np.abs(found[0] - right[-1]).max() < 1e-3
    session.close()


def test_session_steps_rewinds_and_ends(model: Path, tmp_path: Path) -> None:
    ids = tokens(CONTEXT, seed=5)
    right = expected(model, ids)
    session = export(open_checkpoint(model), "onnx", Params(), tmp_path / "engine").open(1)
    assert np.abs(session.prefill(ids[:60])[0] - right[59]).max() < 1e-3
    for position in range(60, 80):
        assert np.abs(session.step(ids[position]) - right[position]).max() < 1e-3
    session.rewind(30)
    assert np.abs(session.prefill(ids[30:70], every=True) - right[30:70]).max() < 1e-3
    session.prefill(ids[70:-1])
    assert np.abs(session.step(ids[-1]) - right[-1]).max() < 1e-3
    assert session.position == CONTEXT
    for append in (lambda: session.step(1), lambda: session.prefill([1, 2])):
        with pytest.raises(EdgemedError, match="longer than the context"):
            append()
    session.rewind(0)
    with pytest.raises(EdgemedError, match="194 tokens, 192 fit"):
        session.prefill([0] * 194)
    assert np.abs(session.prefill(ids[:5])[0] - right[4]).max() < 1e-3
    session.close()


def test_the_cache_is_written_in_place(model: Path, tmp_path: Path) -> None:
    session = export(open_checkpoint(model), "onnx", Params(), tmp_path / "engine").open(1)
    names = [value.name for value in session.session.get_inputs() if value.name.startswith("past.")]
    assert len(names) == 4

    def outputs() -> dict[str, tuple[int, np.ndarray]]:
        values = zip(session.session.get_outputs(), session.binding.get_outputs(), strict=True)
        return {
            meta.name: (value.data_ptr(), value.numpy())
            for meta, value in values
            if meta.name.startswith("present.")
        }

    session.prefill(TOKENS[:10])
    before = outputs()
    session.step(TOKENS[10])
    after = outputs()
    assert {name: pointer for name, (pointer, _) in before.items()} == {
        name: pointer for name, (pointer, _) in after.items()
    }
    for name, (_, cache) in after.items():
        assert cache.shape == (1, 4, CONTEXT, 16)
        assert np.abs(cache[:, :, 10]).sum() > 0, (
            f"{name} is not the buffer that the next step reads"
        )
        assert not cache[:, :, 11:].any(), f"{name} is not the buffer that the next step reads"
    # The output of one step is the input of the next: what is written into it from outside changes
    # the answer.
    session.rewind(10)
    plain = session.step(TOKENS[10]).copy()
    buffer = onnxruntime_view(after["present.0.value"][0], (1, 4, CONTEXT, 16))
    buffer[:, :, :10] += 1
    session.rewind(10)
    assert np.abs(session.step(TOKENS[10]) - plain).max() > 1e-3
    session.close()


def onnxruntime_view(pointer: int, shape: tuple[int, ...]) -> np.ndarray:
    import ctypes

    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape)


def test_weights_move_into_huge_pages_unchanged() -> None:
    switch = ort_session.PAGES / "enabled"
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    if (
        platform.system() != "Linux"
        or not switch.exists()
        or "[never]" in switch.read_text()
        or version < (6, 1)
    ):
        pytest.skip("this kernel cannot move pages into huge ones on request")
    content = os.urandom(1 << 20) * 32
    buffer = mmap.mmap(-1, len(content), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_NOHUGEPAGE)
    buffer[:] = content
    buffer.madvise(mmap.MADV_HUGEPAGE)
    small = huge_bytes()
    ort_session._use_huge_pages()
    assert buffer[:] == content
    assert huge_bytes() - small >= len(content) // 2


def huge_bytes() -> int:
    return (
        int(re.search(r"AnonHugePages: *(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
        << 10
    )


def test_export_is_the_same_every_time(model: Path, tmp_path: Path) -> None:
    made = [
        export(open_checkpoint(model), "onnx", Params("int4", 32), tmp_path / name, name="same")
        for name in ("a", "b")
    ]
    files = [json.loads((engine.path / "manifest.json").read_text())["files"] for engine in made]
    assert files[0] == files[1]
    assert "model.onnx.data" in files[0]


@pytest.mark.parametrize(
    ("changes", "params", "said"),
    [
        ({"n_head": 16}, Params(), "multiple of 8"),
        ({"n_embd": 80, "n_head": 5}, Params(), "multiple of 32"),
        ({}, Params("int4", 128), "group 128 does not divide"),
    ],
)
def test_what_it_cannot_take(
    tmp_path: Path, changes: dict[str, int], params: Params, said: str
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", **changes))
    with pytest.raises(EdgemedError, match=said):
        export(checkpoint, "onnx", params, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_engines_for_cuda(model: Path, tmp_path: Path) -> None:
    """No GPU here: the float16 graph is checked on the CPU, and an engine for CUDA says what is
    missing.
    """
    import onnxruntime

    engine = export(
        open_checkpoint(model),
        "onnx",
        Params(
            "int4",
            32,
            accuracy_level=1,
            provider="cuda",
        ),
        tmp_path / "engine",
    )
    weights = Rounded(open_checkpoint(model))
    found = scores(replace(engine, params={**engine.params, "provider": "cpu"}))
    assert np.abs(found - expected(weights)).max() < 0.1
    kinds = {
        value.type.tensor_type.elem_type
        for value in onnx.load(engine.path / "model.onnx", load_external_data=False).graph.input
        if value.name.startswith("past.")
    }
    assert kinds == {onnx.TensorProto.FLOAT16}
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(
            EdgemedError,
            match="exported for CUDA, and this onnxruntime has no CUDA provider.*onnx-gpu",
        ):
            engine.open(1)
    with pytest.raises(EdgemedError, match="takes float16, not float32"):
        export(open_checkpoint(model), "onnx", Params("fp32", provider="cuda"), tmp_path / "other")
