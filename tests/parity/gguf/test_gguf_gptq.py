"""GPTQ on llama.cpp's types: the codes lie where ggml reads them, errors get smaller, and what a
killed export had finished is not done again.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_config

pytest.importorskip("llama_cpp")

from edgemed import plugins
from edgemed.artifacts import hashing, store
from edgemed.engines.engine import Engine, export
from edgemed.errors import EdgemedError
from edgemed.gguf import gptq
from edgemed.gguf.gptq import CODES, gptq_blocks, quantize_matrix
from edgemed.gguf.quant_types import block_of
from edgemed.gguf.writer import Encoder
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.random_weights import make_random
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.gptq import Hessian, output_error
from edgemed.targets import llamacpp
from edgemed.targets.llamacpp import Params

TRAINED = plugins.shared("recipes") / "quickstart" / "model"
CODEBOOKS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")
TEXT = {"imatrix": "pubmedqa-abstracts", "samples": 4, "length": 64}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    with Encoder(1) as one:
        yield one


@pytest.fixture(scope="module")
def seen() -> tuple[torch.Tensor, torch.Tensor, Hessian]:
    """A matrix, the second moment of its inputs (correlated, some far larger than others) and the
    same again for its root.
    """
    generator = torch.Generator().manual_seed(0)
    mixed = (
        torch.randn(2000, 512, generator=generator)
        @ torch.randn(512, 512, generator=generator)
        * torch.logspace(-1, 1, 512)[torch.randperm(512, generator=generator)]
    )
    inputs = Hessian(512)
    inputs.add(mixed)
    return 0.05 * torch.randn(48, 512, generator=generator), inputs.moment.clone(), inputs


def expanded(kind: str, data: np.ndarray) -> np.ndarray:
    """By gguf's Python, which is not what the package expands with."""
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def llama_quantize(
    encoder: Encoder, kind: str, weight: torch.Tensor, moment: torch.Tensor
) -> np.ndarray:
    return quantize_matrix(encoder, kind, weight, None, moment.diagonal().numpy())[0]


@pytest.mark.parametrize("kind", CODES)
def test_codes_lie_where_ggml_reads_them(encoder, seen, kind):
    """Against gguf's own expansion: every code at every place gives offset + step * table[code],
    and nothing but codes changes.
    """
    codes = CODES[kind]
    width = block_of(kind)
    blocks = llama_quantize(encoder, kind, seen[0], seen[1]).reshape(48 * 512 // width, -1)
    before = blocks.copy()

    def written(values: np.ndarray) -> np.ndarray:
        codes.put(blocks, values.astype(np.uint8))
        return expanded(kind, blocks)

    values = np.random.default_rng(0).integers(codes.least, codes.count, (len(blocks), width))
    offset = 0 if codes.table else written(np.zeros_like(values))
    step = written(np.full_like(values, codes.unit)) - offset
    table = np.array(codes.table or range(codes.count))
    assert np.abs(written(values) - (offset + step * table[values])).max() < 1e-6
    assert (step != 0).any(1).all(), "a block without a scale would show nothing"
    # llama.cpp's own choice, found again from its numbers, gives its bytes.
    scaled = (expanded(kind, before) - offset) / np.where(step == 0, 1, step)
    again = np.abs(scaled[..., None] - table).argmin(-1)
    exact = (step != 0).all(1)
    written(again)
    assert exact.any()
    assert np.array_equal(blocks[exact], before[exact])


@pytest.mark.parametrize("kind", [*CODES, *CODEBOOKS])
def test_what_is_left_is_less_than_llama_quantize_leaves(encoder, seen, kind):
    weight, moment, _inputs = seen
    root = Hessian(512)
    root.lower.copy_(moment)
    data, dense = gptq_blocks(encoder, kind, weight, root.inverse_factor(0.01))
    theirs = llama_quantize(encoder, kind, weight, moment)
    assert data.shape == theirs.shape
    assert np.array_equal(expanded(kind, data), dense.numpy())
    errors = [
        output_error(weight, rounded, moment)
        for rounded in (dense, torch.from_numpy(expanded(kind, theirs)))
    ]
    assert errors[0] < (0.95 if kind in CODEBOOKS or kind == "Q2_K" else 0.75) * errors[1]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_floats_are_only_shortened(encoder, seen, kind, dtype):
    """What a row falls back to whose length no block divides."""
    weight, _, inputs = seen
    data, dense = quantize_matrix(encoder, kind, weight, inputs.inverse_factor(0.01))
    assert torch.equal(dense, weight.to(dtype).float())
    assert np.array_equal(data, weight.to(dtype).view(torch.uint8).numpy())


def test_columns_are_swept_as_gptq_sweeps_them(encoder, seen):
    """Q8_0 of 32 columns has one scale per row: against the textbook loop, with the inverse of the
    second moment made anew for each column.
    """
    weight, moment, _ = seen
    weight = weight[:, :32].contiguous()
    moment = moment[:32, :32]
    inputs = Hessian(32)
    inputs.lower.copy_(moment)
    root = inputs.inverse_factor(0.01)
    data, dense = gptq_blocks(encoder, "Q8_0", weight, root)
    step = torch.from_numpy(data[:, :2].copy().view(np.float16).astype(np.float32))[:, 0].double()
    left = weight.double().clone()
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(32)
    for column in range(32):
        inverse = torch.linalg.inv(damped[column:, column:])
        rounded = (left[:, column] / step).round().clamp(-127, 127) * step
        left[:, column + 1 :] -= ((left[:, column] - rounded) / inverse[0, 0])[:, None] * inverse[
            0, 1:
        ]
        left[:, column] = rounded
    assert float((left.float() == dense).float().mean()) > 0.99
    assert float((left - dense).abs().max()) <= float(step.max()) * 1.01


def exported(checkpoint: Checkpoint, out: Path, **values: object) -> Engine:
    return export(checkpoint, "llamacpp", Params(**{**TEXT, **values}), out)


def divergence(checkpoint: Checkpoint, engine: Engine, tokens: list[int]) -> float:
    source = (
        logits(CanonicalWeights(checkpoint), torch.tensor([tokens]))[0].double().log_softmax(-1)
    )
    session = engine.open(1)
    found = torch.from_numpy(session.prefill(tokens, every=True).copy()).double().log_softmax(-1)
    session.close()
    return float((source.exp() * (source - found)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["q4_k_m", "iq4_xs"])
def test_a_trained_model_stays_nearer_to_its_source(tmp_path, kind):
    checkpoint = open_checkpoint(TRAINED)
    tokens = np.random.default_rng(1).integers(0, 4096, 96).tolist()
    engines = {
        way: exported(checkpoint, tmp_path / way, type=kind, rounding=way, samples=12, length=96)
        for way in ("nearest", "gptq")
    }
    files = [gguf.GGUFReader(engine.path / "model.gguf").tensors for engine in engines.values()]
    assert [(t.name, t.tensor_type, t.n_bytes) for t in files[0]] == [
        (t.name, t.tensor_type, t.n_bytes) for t in files[1]
    ]
    assert all(
        np.array_equal(a.data, b.data)
        for a, b in zip(*files, strict=True)
        if not a.name.startswith("blk.") or len(a.shape) < 2
    )
    found = {way: divergence(checkpoint, engine, tokens) for way, engine in engines.items()}
    assert found["gptq"] < 0.8 * found["nearest"]
    notes = store.read_manifest(engines["gptq"].path)["notes"]
    assert notes["integers"] == "gptq, on llama.cpp's types"
    assert len(notes["errors"]) == 24
    assert notes["errors"]["layers.5.down"]["output"] > 0
    assert not list(tmp_path.glob(".*"))


def test_a_budget_counts_with_what_gptq_leaves(tmp_path):
    checkpoint = open_checkpoint(TRAINED)
    facts = {
        way: store.read_manifest(
            exported(
                checkpoint, tmp_path / way, budget="5.2bpw", rounding=way, samples=8, length=128
            ).path
        )["notes"]["allocation"]
        for way in ("nearest", "gptq")
    }
    assert facts["gptq"]["tensor_bytes"] <= facts["nearest"]["tensor_bytes"] * 1.01
    assert facts["gptq"]["expected_kl"] < 0.9 * facts["nearest"]["expected_kl"]


@pytest.mark.parametrize("family", plugins.names("families"))
def test_every_family_can_be_rounded_so(tmp_path, monkeypatch, family):
    """Rows cut, interleaved, stacked as experts, or with their mean taken out: Q8_0 answers as the
    source does, as well as by llama.cpp's own rounding.
    """
    checkpoint = make_random(
        tiny_config(plugins.load("families", family).FAMILY.reference_name),
        tmp_path / "source",
        "float32",
    )
    windows = np.random.default_rng(0).integers(0, 128, (6, 48)).tolist()
    # A random model has no tokenizer: its text is made of numbers.
    monkeypatch.setattr(llamacpp, "_calibration", lambda *_: [(window, None) for window in windows])
    found = {
        way: divergence(
            checkpoint, exported(checkpoint, tmp_path / way, type="q8_0", rounding=way), windows[0]
        )
        for way in ("nearest", "gptq")
    }
    # Where a router picks between random experts, the last bit of an 8-bit weight may send a token
    # elsewhere.
    assert (
        found["gptq"]
        < 1.05 * found["nearest"]
        < (0.1 if CanonicalWeights(checkpoint).decoder.experts else 0.01)
    )


def killed(checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """An export that ends, without a word, when layer `after` is to be rounded."""
    real = gptq.gptq_layer

    def dies(weights, n, *rest):
        if n == after:
            raise KeyboardInterrupt
        return real(weights, n, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gptq, "gptq_layer", dies)
        exported(checkpoint, out, type="q3_k_m", rounding="gptq")


def test_a_killed_export_goes_on_with_the_same_result(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(TRAINED)
    begun = []
    real = gptq.gptq_layer
    whole = exported(checkpoint, tmp_path / "whole", type="q3_k_m", rounding="gptq")
    killed(checkpoint, tmp_path / "again", monkeypatch, 4)
    assert not (tmp_path / "again").exists()
    assert len(list(tmp_path.glob(".again*-layers"))) == 1
    monkeypatch.setattr(
        gptq,
        "gptq_layer",
        lambda weights, n, *rest: begun.append(n) or real(weights, n, *rest),
    )
    again = exported(checkpoint, tmp_path / "again", type="q3_k_m", rounding="gptq")
    assert begun == [4, 5]
    assert hashing.file_sha256(again.path / "model.gguf") == hashing.file_sha256(
        whole.path / "model.gguf"
    )
    assert not list(tmp_path.glob(".*layers"))


def test_where_it_would_have_no_effect_it_is_refused(tmp_path):
    checkpoint = open_checkpoint(TRAINED)
    for said, values in (
        ("no effect", {"type": "f16"}),
        ("calibration text", {"imatrix": None}),
        ("calibration text", {"imatrix": "x.npz"}),
    ):
        reason = llamacpp.supports(
            CanonicalWeights(checkpoint), Params(**{**TEXT, "rounding": "gptq", **values})
        )
        assert reason
        assert said in reason
        with pytest.raises(EdgemedError, match=said):
            exported(checkpoint, tmp_path / "refused", rounding="gptq", **values)


def test_models_that_see_are_calibrated_on_images_too(tmp_path):
    checkpoint = open_checkpoint(plugins.shared("recipes") / "quickstart-vlm" / "model")
    cards = {
        "imatrix": "medquad-answers,vqa-rad-questions",
        "samples": 4,
        "length": 256,
        "type": "q4_0",
    }
    tokens = np.random.default_rng(1).integers(0, 2048, 64).tolist()
    found = {
        way: divergence(
            checkpoint, exported(checkpoint, tmp_path / way, rounding=way, **cards), tokens
        )
        for way in ("nearest", "gptq")
    }
    assert found["gptq"] < 0.8 * found["nearest"]
    assert sorted(store.read_manifest(tmp_path / "gptq")["inputs"]) == sorted(
        store.read_manifest(tmp_path / "nearest")["inputs"]
    )
