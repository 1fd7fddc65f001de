"""Groups of scales where rows are no multiple of 128: the largest that divides, per matrix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, refused, write_model

torch = pytest.importorskip("torch")

from edgemed.engines.engine import export
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.targets import onnx

IDS = [7, 3, 99, 250, 12, 41, 41, 8]
# Rows of 192 and 384 weights, as a small published model has 576 and 1536.
SIZES = {"n_embd": 192, "n_head": 6, "n_inner": 384}


def scores(folder: Path) -> np.ndarray:
    return logits(CanonicalWeights(open_checkpoint(folder)), torch.tensor([IDS]))[0].numpy()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("narrow") / "model", **SIZES)


def test_quantize_takes_the_largest_that_divides(narrow: Path, tmp_path: Path) -> None:
    done = cli("quantize", narrow, "--out", tmp_path / "q", "--method", "rtn", "--bits", 8)
    assert done.returncode == 0, done.stderr
    # Said aloud and in the manifest.
    assert "matrices of 64" in done.stderr
    assert "matrices of 128" in done.stderr
    layers = open_checkpoint(narrow).config["n_layer"]
    notes = json.loads((tmp_path / "q" / "manifest.json").read_text())["notes"]
    assert notes["groups"] == {"64": 3 * layers, "128": layers}
    weights = CanonicalWeights(open_checkpoint(tmp_path / "q"))
    assert weights.packings() == {(8, 64), (8, 128)}
    expected = scores(narrow)
    assert np.abs(scores(tmp_path / "q") - expected).max() < 0.05 * np.abs(expected).max()
    # Every engine carries these integers.
    for target in ("onnx", "llamacpp"):
        options = ["--set", "from_checkpoint=true"] if target == "llamacpp" else []
        out = tmp_path / target
        arguments = ("export", tmp_path / "q", "--target", target, "--out", out, *options)
        done = cli(*arguments, "--prompts", "none")
        assert done.returncode == 0, done.stderr


def test_a_group_asked_for_is_not_changed(narrow: Path, tmp_path: Path) -> None:
    done = cli(
        *("quantize", narrow, "--out", tmp_path / "q", "--method", "rtn", "--group", 128),
    )
    refused(done, "128 does not divide a row of 192", "Choose group 32, 64, -1")


def test_no_group_divides(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", n_embd=80, n_head=5, n_inner=320)
    done = cli("quantize", model, "--out", tmp_path / "q", "--method", "rtn")
    refused(done, "no group of 128, 64, 32", "Give group: -1")


def test_onnx_rounds_in_the_largest_that_divides(narrow: Path, tmp_path: Path) -> None:
    engine = export(open_checkpoint(narrow), "onnx", onnx.Params("int8"), tmp_path / "engine")
    assert "64" in engine.precision
    assert "128" in engine.precision
    session = engine.open(1)
    try:
        own = session.prefill(IDS, every=True).copy()
    finally:
        session.close()
    expected = scores(narrow)
    assert np.abs(own - expected).max() < 0.1 * np.abs(expected).max()
