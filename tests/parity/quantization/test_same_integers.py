"""One quantization, many engines: an int4 GPTQ checkpoint in ONNX and in Q4_0 carries the same
integers and gives the same answers.

llama.cpp always rounds activations to 8 bits, so the answers are compared twice: with float32
activations on both sides (the shipped Q4_0 file expanded to F32 by llama.cpp itself), and as the
engines really run.
"""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

MODEL = ROOT / "recipes" / "quickstart" / "model"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from edgemed.engines.engine import export
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.pipeline.recipe import Stage
    from edgemed.pipeline.runner import run_step
    from edgemed.steps import quantize
    from edgemed.targets import llamacpp, onnx

    work = tmp_path_factory.mktemp("one")
    params = quantize.Params(
        method="gptq",
        bits=4,
        group=64,
        calibration="pubmedqa-abstracts",
        samples=16,
        length=128,
    )
    packed = run_step(Stage("quantize", params), open_checkpoint(MODEL), work, work / "int4")
    made = {"checkpoint": packed.path}
    for name, target, chosen in (
        ("onnx_float", "onnx", onnx.Params(accuracy_level=1)),
        ("onnx", "onnx", onnx.Params()),
        ("q4_0", "llamacpp", llamacpp.Params(from_checkpoint=True)),
    ):
        made[name] = export(packed, target, chosen, work / name).path
    made["q4_0_float"] = expanded(made["q4_0"], work / "q4_0_float")
    return made


def expanded(engine: Path, out: Path) -> Path:
    """The same GGUF with every tensor expanded to F32 by llama.cpp's own quantizer."""
    import llama_cpp

    out.mkdir()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        str(engine / "model.gguf").encode(), str(out / "model.gguf").encode(), ctypes.byref(params)
    )
    assert code == 0
    return out


def answers(path: Path, like: Path | None = None) -> np.ndarray:
    """Scores [positions, vocab] over held-out windows; `like`: the engine whose facts describe a
    bare file.
    """
    from edgemed.data.text_sets import texts
    from edgemed.engines.engine import open_engine
    from edgemed.models.tokenizer import encode

    engine = open_engine(like or path)
    if like:
        engine = dataclasses.replace(engine, path=path, precision="F32")
    tokenizer = open_engine(like or path).tokenizer()
    session = engine.open(2)
    rows = []
    for text in texts("pubmedqa-abstracts", "heldout")[:12]:
        session.rewind(0)
        rows.append(session.prefill(encode(tokenizer, text)[:96], every=True).copy())
    session.close()
    return np.concatenate(rows)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.argmax(-1) == b.argmax(-1)).mean())


def test_the_integers_are_the_same(engines: dict[str, Path]) -> None:
    import gguf
    import onnx

    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights

    weights = CanonicalWeights(open_checkpoint(engines["checkpoint"]))
    graph = {
        t.name: onnx.numpy_helper.to_array(t, str(engines["onnx"]))
        for t in onnx.load(
            engines["onnx"] / "model.onnx", load_external_data=False
        ).graph.initializer
    }
    tensors = {t.name: t for t in gguf.GGUFReader(engines["q4_0"] / "model.gguf").tensors}
    names = {"qkv": "attn_qkv", "o": "attn_output", "up": "ffn_up", "down": "ffn_down"}
    for n in range(weights.decoder.layers):
        for part, stem in names.items():
            matrix = weights.matrix(f"layers.{n}.{part}")
            packed = graph[f"layers.{n}.{part}.q"]
            onnx_q = np.stack([packed & 15, packed >> 4], -1).reshape(matrix.q.shape)
            blocks = np.asarray(tensors[f"blk.{n}.{stem}.weight"].data).reshape(-1, 18)[:, 2:]
            gguf_q = np.concatenate([blocks & 15, blocks >> 4], -1).reshape(matrix.q.shape)
            assert (onnx_q == matrix.q.numpy()).all(), f"layer {n} {part}"
            assert (gguf_q == matrix.q.numpy()).all(), f"layer {n} {part}"


def test_the_same_answers_with_float_activations(engines: dict[str, Path]) -> None:
    onnx_scores = answers(engines["onnx_float"])
    gguf_scores = answers(engines["q4_0_float"], engines["q4_0"])
    assert len(onnx_scores) == 12 * 96
    assert agreement(onnx_scores, gguf_scores) >= 0.995


def test_nearly_the_same_answers_as_shipped(engines: dict[str, Path]) -> None:
    # Both round activations to int8, in different blocks; no bar is promised, but a wrong scale
    # would show at once.
    assert agreement(answers(engines["onnx"]), answers(engines["q4_0"])) >= 0.9
