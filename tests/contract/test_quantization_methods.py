"""What every quantization method must be, checked by walking the folder: a new file is tested by
being there. Nothing here names one of them.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from conftest import tokens, write_model

torch = pytest.importorskip("torch")

from edgemed import params as strict
from edgemed import plugins
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.gptq_checkpoint import BITS
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.method import (
    KIND,
    CheckpointMethod,
    LayerMethod,
    load_method,
    method_names,
)
from edgemed.quantization.settings import QuantizeSettings
from edgemed.steps import quantize

METHODS = method_names()
# Largest relative error |W - W'| / |W| of a matrix of random normal weights, by bits.
BOUNDS = {8: 0.02, 4: 0.2}


def needs_text(name: str) -> bool:
    method = load_method(name)
    return isinstance(method, LayerMethod) and method.calibrated


def values(name: str) -> dict[str, object]:
    """Parameters with which a method quantizes the tiny model."""
    method = load_method(name)
    chosen: dict[str, object] = {"method": name}
    if isinstance(method, LayerMethod):
        chosen["bits"], chosen["group"] = method.packing or (8, 32)
    if needs_text(name):
        chosen |= {"calibration": "pubmedqa-abstracts", "samples": 4, "length": 32}
    return chosen


@pytest.mark.parametrize("name", METHODS)
def test_method_value(name: str) -> None:
    method = load_method(name)
    assert isinstance(method, (LayerMethod, CheckpointMethod))
    assert strict.build(quantize.Params, {"method": name}, "quantize").method == name
    if isinstance(method, CheckpointMethod):
        assert list(inspect.signature(method.write).parameters) == [
            "weights",
            "out",
            "double_quant",
        ]
        assert str(method.packing[0]) in method.packing_text
        return
    assert len(inspect.signature(method.quantize_layer).parameters) == 5
    assert method.packing is None or method.packing[0] in BITS
    # Inputs that are read take room, and a correction needs them.
    assert method.calibrated == (method.moments is not None)
    assert method.calibrated or not (method.corrects_inputs or method.scales_inputs)
    if method.moments is not None:
        assert method.moments({"up": (64, 32), "down": (32, 64)}, QuantizeSettings(name)) > 0


@pytest.mark.parametrize("name", METHODS)
def test_methods_never_import_each_other(name: str) -> None:
    file = plugins.ROOT / KIND / f"{name.replace('-', '_')}.py"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert "quantization.methods" not in (node.module or "")


@pytest.mark.parametrize("name", METHODS)
def test_method_quantizes_a_tiny_model(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "model"))
    params = strict.build(quantize.Params, values(name), "quantize")
    (tmp_path / "out").mkdir()
    try:
        notes = quantize.run(source, tmp_path / "out", params)
    except EdgemedError as error:
        if "which is not installed" in str(error):
            pytest.skip(str(error))
        raise
    method = load_method(name)
    bits = method.packing[0] if method.packing else 8
    assert notes["errors"]
    for matrix, errors in notes["errors"].items():
        assert 0 < errors["weight"] < BOUNDS[bits], matrix
        if isinstance(method, LayerMethod):
            assert ("output" in errors) == needs_text(name)
    assert bits <= notes["bits_per_weight"] < bits + 3
    quantized = CanonicalWeights(open_checkpoint(tmp_path / "out"))
    assert quantized.quantized
    ids = torch.tensor([tokens(32)])
    exact = logits(CanonicalWeights(source), ids)
    error = (logits(quantized, ids) - exact).norm() / exact.norm()
    assert error < 2 * BOUNDS[bits], "the whole model is as near as its matrices are"


@pytest.mark.parametrize("name", [name for name in METHODS if needs_text(name)])
def test_method_says_that_it_needs_text(name: str) -> None:
    with pytest.raises(EdgemedError, match=f"{name} needs calibration text"):
        quantize.inputs(strict.build(quantize.Params, {"method": name}, "quantize"))


def test_an_unknown_method_is_told_the_known_ones() -> None:
    for raised in (
        lambda: strict.build(quantize.Params, {"method": "rnt"}, "quantize"),
        lambda: load_method("rnt"),
    ):
        with pytest.raises(EdgemedError, match="'rnt'") as error:
            raised()
        assert "\n" not in str(error.value)
        assert "Did you mean 'rtn'?" in str(error.value)
        for name in METHODS:
            assert name.partition("-")[0] in str(error.value)
