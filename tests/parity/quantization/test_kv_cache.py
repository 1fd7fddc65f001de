"""The int8 KV cache of ONNX engines against the torch decoder whose cache is rounded with the very
same scales, and what an engine says of its size.

An engine that forgot a scale, rounded before the rotary positions or mixed heads up would differ by
far more than the bound.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import CONTEXT, tokens, write_model

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgemed.artifacts import store
from edgemed.engines.engine import Engine, export
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.random_weights import make_random
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.kv_cache_scales import kv_scales
from edgemed.targets import onnx as target
from edgemed.targets.onnx import Params

FAMILIES = {
    "gpt2": {},
    "llama": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
IDS = tokens(60)


class Rounding:
    """A cache of keys or values that keeps what an int8 cache keeps."""

    def __init__(self, held: torch.Tensor, scale: np.ndarray):
        self.held = held
        self.scale = torch.tensor(scale)

    def __setitem__(self, where: tuple, rows: torch.Tensor) -> None:
        self.held[where] = (rows / self.scale).round().clamp(-128, 127) * self.scale

    def __getitem__(self, where: tuple) -> torch.Tensor:
        return self.held[where]


@pytest.fixture(scope="module", params=FAMILIES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CanonicalWeights, Engine]:
    folder = tmp_path_factory.mktemp(f"kv-{request.param}")
    text = folder / "text.txt"
    text.write_text("The patient was given aspirin and sent home after an hour of rest. " * 30)
    checkpoint = open_checkpoint(
        write_model(folder / "model", family=request.param, **FAMILIES[request.param])
    )
    return CanonicalWeights(checkpoint), export(
        checkpoint,
        "onnx",
        Params(
            "fp32",
            kv="int8",
            calibration=str(text),
            samples=4,
            length=64,
        ),
        folder / "engine",
    )


def test_the_cache_is_rounded_channel_by_channel(made: tuple[CanonicalWeights, Engine]) -> None:
    weights, engine = made
    stored = {
        t.name: onnx.numpy_helper.to_array(t, str(engine.path))
        for t in onnx.load(engine.path / "model.onnx").graph.initializer
    }
    right = TorchSession(weights)
    plain = TorchSession(weights)
    right.cache = [
        tuple(
            Rounding(held, stored[f"layers.{n}.attention.{part}_scale"])
            for held, part in zip(pair, ("key", "value"), strict=True)
        )
        for n, pair in enumerate(right.cache)
    ]
    session = engine.open(1)
    expected = right.prefill(IDS[:40], every=True)
    exact = plain.prefill(IDS[:40], every=True)
    assert (
        np.abs(session.prefill(IDS[:40], every=True) - expected).max()
        < 0.02 * np.abs(expected).max()
    )
    for token in IDS[40:]:
        assert np.abs(session.step(token) - right.step(token)).max() < 0.02 * np.abs(expected).max()
    # Random tokens go beyond what calibration saw: what is compared with differs much from a float
    # cache, or the bound would say little.
    assert np.abs(expected - exact).max() > 0.02 * np.abs(exact).max()
    session.rewind(10)
    again = session.prefill(IDS[10:40])[0]
    assert np.abs(again - expected[-1]).max() < 0.02 * np.abs(expected).max()
    session.close()


def test_the_manifest_says_how_large_the_cache_is(
    made: tuple[CanonicalWeights, Engine], tmp_path: Path
) -> None:
    weights, engine = made
    d = weights.decoder
    numbers = 2 * d.layers * d.kv_heads * d.head_dim * CONTEXT
    assert store.read_manifest(engine.path)["notes"]["kv_cache"] == {
        "type": "int8",
        "bytes": numbers,
    }
    session = engine.open(1)
    assert {
        (v.type, v.shape[1], v.shape[3])
        for v in session.session.get_inputs()
        if v.name.startswith("past.")
    } == {("tensor(int8)", d.kv_heads, d.head_dim)}
    session.close()
    float_engine = export(
        weights.checkpoint, "onnx", Params("fp32", context=64), tmp_path / "float"
    )
    assert store.read_manifest(float_engine.path)["notes"]["kv_cache"] == {
        "type": "float32",
        "bytes": 4 * numbers * 64 // CONTEXT,
    }


def test_scales_are_the_largest_magnitudes(made: tuple[CanonicalWeights, Engine]) -> None:
    """Against a cache filled by the decoder itself: values exactly, keys by the length of each
    rotated pair.
    """
    weights, _ = made
    d = weights.decoder
    windows = [tokens(32, seed) for seed in (1, 2, 3)]
    largest = [
        [np.zeros((d.kv_heads, d.head_dim), np.float32) for _ in "kv"] for _ in range(d.layers)
    ]
    session = TorchSession(weights)
    half = len(d.rope_frequencies)
    for window in windows:
        session.rewind(0)
        session.prefill(window)
        for known, (keys, values) in zip(largest, session.cache, strict=True):
            k = keys[0, :, :32].numpy().copy()
            v = values[0, :, :32].numpy()
            if half:
                k[..., :half] = k[..., half : 2 * half] = np.hypot(
                    k[..., :half], k[..., half : 2 * half]
                )
            known[0] = np.maximum(known[0], np.abs(k).max(1))
            known[1] = np.maximum(known[1], np.abs(v).max(1))
    for (key, value), known in zip(kv_scales(weights, windows), largest, strict=True):
        np.testing.assert_allclose(key[0, :, 0], known[0] / 127, rtol=1e-4)
        np.testing.assert_allclose(value[0, :, 0], known[1] / 127, rtol=1e-4)


def test_what_an_int8_cache_cannot_be(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    for wrong, said in (
        (Params(kv="int8"), "needs text to measure its scales on"),
        (Params(calibration="pubmedqa-abstracts"), "read for an int8 cache only"),
        (Params("fp16", kv="int8", calibration="pubmedqa-abstracts"), "only ever run on the CPU"),
        (
            Params(
                "fp32",
                kv="int8",
                calibration="pubmedqa-abstracts",
                samples=0,
            ),
            "samples and length",
        ),
        (Params("fp32", kv="int8", calibration="no-such-card"), "unknown text set"),
    ):
        with pytest.raises(EdgemedError, match=said):
            target.inputs(wrong)
            export(checkpoint, "onnx", wrong, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_random_weights_need_no_tokenizer(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 300,
        "eos_token_id": 0,
        "activation_function": "gelu_new",
    }
    checkpoint = make_random(config, tmp_path / "random")
    session = export(
        checkpoint,
        "onnx",
        Params("fp32", kv="int8", calibration="pubmedqa-abstracts"),
        tmp_path / "engine",
    ).open(1)
    assert np.isfinite(session.prefill([1, 2, 3])).all()
    session.close()
