"""The ONNX vision tower in each of its precisions against the torch tower, and integers that are
taken row by row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_model

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
Image = pytest.importorskip("PIL.Image")

from edgemed import plugins
from edgemed.engines.engine import export
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.onnx.decoder_graph import Graph, Precision
from edgemed.onnx.ort_cpu_types import started
from edgemed.onnx.ort_dialect import OrtDialect
from edgemed.onnx.vision_graph import TOWERS
from edgemed.vision import torch_encoder
from edgemed.vision.preprocessing import patches

LIMITS = {"fp32": 1e-5, "fp16": 2e-3, "int8": 3e-2, "w8a8": 4e-2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        write_model(tmp_path_factory.mktemp("sees") / "model", family="qwen2_vl")
    )


@pytest.mark.parametrize("kind", sorted(TOWERS))
def test_features_equal_the_torch_tower(source: Checkpoint, tmp_path: Path, kind: str) -> None:
    engine = export(
        source, "onnx", plugins.load("targets", "onnx").Params(tower=kind), tmp_path / "engine"
    )
    vision_encoder = engine.open_vision(1)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 140, 3), dtype=np.uint8))
    # One colour: every patch is the same, and so is every row of what follows.
    for image in (noise, Image.new("RGB", (56, 56), "black")):
        right = torch_encoder.features(CanonicalWeights(source), patches(image, vision_encoder.v))[
            "features"
        ].numpy()
        found = vision_encoder.features(image)[0]
        assert np.linalg.norm(found - right) / np.linalg.norm(right) < LIMITS[kind]


def integers(
    folder: Path, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, zero: int
) -> Any:
    graph = Graph(folder, Precision("float32", 8, integers=True))
    graph.value("inputs", "x", graph.float_type, ["rows", x.shape[1]])
    result = OrtDialect().integers(graph, "product", x="x", weight=weight, bias=bias, zero=zero)
    graph.value("outputs", result, graph.float_type, ["rows", len(weight)])
    graph.save("integers", OrtDialect())
    return started(folder / "model.onnx", wide=False, threads=1, integers=True).run(None, {"x": x})[
        0
    ]


@pytest.mark.parametrize("zero", [128, 16])
def test_rows_have_scales_of_their_own(tmp_path: Path, zero: int) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((5, 96), dtype=np.float32)
    weight = random.standard_normal((40, 96), dtype=np.float32)
    bias = random.standard_normal(40, dtype=np.float32)
    x = np.abs(x) - 0.1 if zero == 16 else x
    # A loud row and a silent one: neither costs the others a digit.
    x[1] *= 1e4
    x[2] = 0
    weight[3] = 0
    found = integers(tmp_path, x, weight, bias, zero)
    right = x @ weight.T + bias
    assert np.allclose(found[2], bias)
    assert np.allclose(found[:, 3], bias[3])
    for n in (0, 1, 3, 4):
        assert np.linalg.norm(found[n] - right[n]) / np.linalg.norm(right[n]) < 0.012
    # What numpy makes of the same rounding.
    step = np.maximum(x.max(1) / (255 - zero), -x.min(1) / zero)[[0, 4]]
    scale = np.abs(weight).max(1) / 127
    rounded = (
        np.clip(np.rint(x[[0, 4]] / step[:, None]), -zero, 255 - zero)
        @ np.rint(weight / np.where(scale, scale, 1)[:, None]).T
    )
    assert np.allclose(found[[0, 4]], rounded * step[:, None] * scale + bias, rtol=1e-4, atol=1e-4)
