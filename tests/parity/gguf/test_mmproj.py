"""A vision tower as llama.cpp's mmproj file: what is in it, what libmtmd computes from it against
the torch tower, and which towers are refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import write_model

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
Image = pytest.importorskip("PIL.Image")

from edgemed import plugins
from edgemed.artifacts import store
from edgemed.engines.engine import Engine, export
from edgemed.errors import EdgemedError
from edgemed.gguf import mmproj
from edgemed.inference.decoding import Sampling, generate
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.random_weights import make_random
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.vision import torch_encoder
from edgemed.vision.preprocessing import patches

TOKEN = 260
BEFORE = 262
AFTER = 263  # image, vision start and end in the tiny config
# A plain one, one that the model's rule makes larger and llama.cpp's own would make larger still, a
# wide one, one too narrow for max_pixels.
SIZES = [(140, 84), (20, 30), (333, 100), (1000, 10)]


def noise(width: int, height: int) -> Any:
    return Image.fromarray(
        np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        write_model(
            tmp_path_factory.mktemp("sees") / "model",
            family="qwen2_vl",
            max_position_embeddings=1024,
        )
    )


def made(source: Checkpoint, out: Path, **params: object) -> Engine:
    pytest.importorskip("llama_cpp")
    module = plugins.load("targets", "llamacpp")
    return export(
        source,
        "llamacpp",
        module.Params(**{"type": "f32", "max_pixels": 28 * 28 * 64, **params}),
        out,
    )


def right(source: Checkpoint, vision_encoder: Any, image: Any) -> np.ndarray:
    return torch_encoder.features(CanonicalWeights(source), patches(image, vision_encoder.v))[
        "features"
    ].numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative, of the whole array."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("kind", "limit"), [("f32", 1e-3), ("f16", 2e-3), ("q8_0", 3e-2)])
def test_features_equal_the_torch_tower(
    source: Checkpoint, tmp_path: Path, kind: str, limit: float
) -> None:
    engine = made(source, tmp_path / "engine", vision="mtmd", mmproj=kind)
    vision_encoder = engine.open_vision(1)
    try:
        assert type(vision_encoder).__name__ == "MtmdVisionEncoder"
        for size in SIZES:
            expected = right(source, vision_encoder, noise(*size))
            found, (rows, columns) = vision_encoder.features(noise(*size))
            assert found.shape == expected.shape, size
            assert rows * columns == len(found), size
            assert error(found, expected) < limit, size
    finally:
        vision_encoder.close()


def test_an_engine_with_these_eyes_answers_as_its_source(
    source: Checkpoint, tmp_path: Path
) -> None:
    engine = made(source, tmp_path / "engine", vision="mtmd", mmproj="f32")
    prompt = [5, 9, BEFORE, TOKEN, AFTER, 30, BEFORE, TOKEN, AFTER, 77]
    images = [noise(140, 84), noise(60, 60)]
    answers = []
    for vision_encoder, session in (
        (engine.open_vision(1), engine.open(1)),
        (
            torch_encoder.TorchVisionEncoder(CanonicalWeights(source)),
            TorchSession(CanonicalWeights(source)),
        ),
    ):
        tokens, pictures = vision_encoder.see(prompt, images)
        answers.append(
            (
                tokens,
                list(generate(session, tokens, Sampling(max_tokens=24), frozenset(), pictures)),
            )
        )
        spent = getattr(
            vision_encoder, "seconds", {"preprocess": 1.0, "tower": 1.0, "projector": 0.0}
        )
        assert spent["preprocess"] > 0, "tower and projector are one graph"
        assert spent["tower"] > 0, "tower and projector are one graph"
        assert spent["projector"] == 0.0, "tower and projector are one graph"
        vision_encoder.see(prompt, images)
        session.close()
        if hasattr(vision_encoder, "seconds"):
            assert set(vision_encoder.seconds.values()) == {0.0}, "kept"
        vision_encoder.close()
    assert answers[0] == answers[1]
    assert len(set(answers[0][1])) > 3


def test_which_files_are_written(source: Checkpoint, tmp_path: Path) -> None:
    def files(engine: Engine) -> set[str]:
        return {path.name for path in engine.path.iterdir()} & {
            "mmproj.gguf",
            "tower.onnx",
            "projector.onnx",
        }

    plain, both, alone = (
        made(source, tmp_path / str(n), **params)
        for n, params in enumerate(({}, {"mmproj": "f16"}, {"vision": "mtmd"}))
    )
    assert (files(plain), files(both), files(alone)) == (
        {"tower.onnx", "projector.onnx"},
        {"mmproj.gguf", "tower.onnx", "projector.onnx"},
        {"mmproj.gguf"},
    )
    notes = [store.read_manifest(engine.path)["notes"] for engine in (plain, both, alone)]
    size = sum(t.n_bytes for t in gguf.GGUFReader(both.path / "mmproj.gguf").tensors)
    assert "mmproj_bytes" not in notes[0]
    assert (notes[1]["tower_bytes"], notes[1]["mmproj_bytes"]) == (notes[0]["tower_bytes"], size)
    assert notes[2]["tower_bytes"] == size


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_the_file_is_what_llamacpps_converter_writes(
    source: Checkpoint, tmp_path: Path, kind: str
) -> None:
    weights = CanonicalWeights(source)
    mmproj.write_mmproj(weights, tmp_path, kind)
    reader = gguf.GGUFReader(tmp_path / "mmproj.gguf")
    v = weights.vision
    said = {
        name: reader.get_field(name).contents()
        for name in (
            "general.architecture",
            "general.type",
            "clip.projector_type",
            "clip.vision.embedding_length",
            "clip.vision.projection_dim",
        )
    }
    assert list(said.values()) == [
        "clip",
        "mmproj",
        "qwen2vl_merger",
        v.width,
        weights.decoder.hidden,
    ]
    assert reader.get_field("clip.has_vision_encoder").contents() is True
    found = {t.name: t for t in reader.tensors}
    types = {
        name: found[name].tensor_type.name
        for name in (
            "v.patch_embd.weight",
            "v.blk.0.attn_q.weight",
            "v.blk.1.ln2.bias",
            "mm.2.weight",
        )
    }
    assert (
        list(types.values())
        == {
            "f32": ["F32"] * 4,
            "f16": ["F16", "F16", "F32", "F16"],
            "q8_0": ["F32", "Q8_0", "F32", "Q8_0"],
        }[kind]
    )
    if kind == "f32":
        qkv = weights.matrix("vision.layers.1.qkv")
        patch = weights.matrix("vision.patch").dense().numpy().reshape(v.width, 3, 2, 14, 14)
        assert np.array_equal(
            found["v.blk.1.attn_k.weight"].data, qkv.dense().numpy()[v.width : 2 * v.width]
        )
        assert np.array_equal(found["v.blk.1.attn_v.bias"].data, qkv.bias.numpy()[2 * v.width :])
        assert np.array_equal(found["v.patch_embd.weight.1"].data, patch[:, :, 1])
        assert np.array_equal(found["v.patch_embd.weight"].data, patch[:, :, 0])
        # 5 outside the layers, 8 with weight and bias in each.
        assert len(found) == 2 + 2 * 3 + 16 * v.layers


def test_random_weights_see_too(tmp_path: Path) -> None:
    from conftest import tiny_config

    source = make_random(tiny_config("qwen2_vl"), tmp_path / "random", "float32")
    engine = made(source, tmp_path / "engine", vision="mtmd")
    vision_encoder = engine.open_vision(1)
    assert (
        error(
            vision_encoder.features(noise(84, 84))[0], right(source, vision_encoder, noise(84, 84))
        )
        < 2e-3
    )
    vision_encoder.close()


@pytest.mark.parametrize(
    ("changes", "family", "said"),
    [
        ({"frequencies": ()}, {}, "llama.cpp computes CLIP towers wrongly.*25814"),
        ({}, {"gguf_projector": ""}, "knows no projector of family qwen2_vl"),
        ({"merge": 1}, {}, "graph needs merge 2; use vision=onnx"),
        (
            {"activation": "gelu", "ffn": 64},
            {},
            "needs activation quick_gelu, an MLP wider than its input",
        ),
    ],
)
def test_towers_that_llamacpp_would_compute_wrongly(
    source: Checkpoint, changes: dict[str, object], family: dict[str, object], said: str
) -> None:
    weights = CanonicalWeights(source)
    odd = SimpleNamespace(
        vision=replace(weights.vision, **changes),
        family=replace(weights.family, **family),
        decoder=weights.decoder,
    )
    import re

    assert mmproj.mmproj_refused(weights) is None
    assert re.search(said, mmproj.mmproj_refused(odd))


def test_bad_input_is_one_line(source: Checkpoint, model: Path, tmp_path: Path) -> None:
    from edgemed.gguf.mtmd_vision import MtmdVisionEncoder

    for params in ({"vision": "mtmd"}, {"mmproj": "f16"}):
        with pytest.raises(EdgemedError, match="reads text only, so there is nothing"):
            made(open_checkpoint(model), tmp_path / "text", **params)
    with pytest.raises(EdgemedError, match="reads text only"):
        MtmdVisionEncoder(made(open_checkpoint(model), tmp_path / "plain"))
    engine = made(source, tmp_path / "engine", vision="mtmd")
    file = engine.path / "mmproj.gguf"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(EdgemedError, match="mmproj.gguf is damaged: tensor .* more than the file"):
        MtmdVisionEncoder(engine)
