"""Experts averaged to a dense model: the weights against torch's own average, what must stay exact,
and what is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import cli, rewrite, tokens
from moe_models import EXPERT, META, MODELS, ROUTER, one_mlp, reference, write

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from edgemed.engines.engine import export
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import TorchSession, logits
from edgemed.models.weights import CanonicalWeights
from edgemed.steps import merge

IDS = tokens(40)
CALIBRATION = {"calibration": "medquad-answers", "samples": 4, "length": 32}


def dense(model: Path, out: Path, **params: object) -> dict:
    out.mkdir()
    return merge.run(open_checkpoint(model), out, merge.Params(experts="dense", **params))


def scores(path: Path) -> torch.Tensor:
    return logits(CanonicalWeights(open_checkpoint(path)), torch.tensor([IDS]))[0]


def experts_alike(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every expert becomes the first; where there is a meta expert, gates become constant."""
    found = {
        key: tensors[re.sub(r"(deepspeed_experts\.)\d+", r"\g<1>0", key)].clone() for key in tensors
    }
    constant = any(META in key for key in tensors)
    return {
        key: torch.zeros_like(value) if constant and ROUTER in key else value
        for key, value in found.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_equal_experts_stays_the_same_function(name: str, tmp_path: Path) -> None:
    model = rewrite(write(tmp_path / "source", name), tmp_path / "model", experts_alike)
    notes = dense(model, tmp_path / "out", weights="usage", **CALIBRATION)
    assert CanonicalWeights(open_checkpoint(tmp_path / "out")).decoder.experts is None
    assert (scores(tmp_path / "out") - scores(model)).abs().max() < 1e-5
    assert set(notes["layers"]) == {"layers.0", "layers.2"}
    assert all(found["error"] < 1e-5 for found in notes["layers"].values())


@pytest.mark.parametrize("name", [name for name, (_, meta) in MODELS.items() if not meta])
def test_weights_are_the_plain_average_and_the_rest_is_copied(name: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", name)
    dense(model, tmp_path / "out")
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = {key for key in before if "deepspeed_moe" not in key}
    averaged = {key.replace(f"{EXPERT}0.", "") for key in before if f"{EXPERT}0." in key}
    assert averaged
    assert set(after) == kept | averaged
    assert all(torch.equal(before[key], after[key]) for key in kept)
    for key in averaged:
        right = torch.stack(
            [before[key.replace("mlp.", f"mlp.{EXPERT}{j}.")] for j in range(4)]
        ).mean(0)
        assert torch.allclose(after[key], right, atol=1e-7), key
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    base = MODELS[name][0]
    assert (
        config["model_type"]
        == {"StableLm": "llava_stablelm", "Phi": "llava_phi", "Qwen2": "moe_llava_qwen"}[base]
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        model / "tokenizer.json"
    ).read_bytes()
    with torch.inference_mode():
        assert (
            scores(tmp_path / "out")
            - reference(tmp_path / "out", config, base)(input_ids=torch.tensor([IDS])).logits[0]
        ).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["moe-tinymed", "moe-tinymed-phi"])
def test_usage_weighs_by_tokens_and_the_error_is_that_of_the_layer(
    name: str, tmp_path: Path
) -> None:
    model = write(tmp_path / "model", name)
    notes = dense(model, tmp_path / "out", weights="usage", **CALIBRATION)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for n in (0, 2):
        found = notes["layers"][f"layers.{n}"]
        assert sum(found["tokens"]) == 2 * 4 * 32
        assert len(set(found["tokens"])) > 1
        assert found["shares"] == [count / (2 * 4 * 32) for count in found["tokens"]]
        assert 0.1 < found["error"] < 2
        last = f"model.layers.{n}.mlp.{'fc2' if 'phi' in name else 'down_proj'}.weight"
        right = sum(
            count * before[last.replace("mlp.", f"mlp.{EXPERT}{j}.")]
            for j, count in enumerate(found["tokens"])
        ) / (2 * 4 * 32)
        assert torch.allclose(after[last], right, atol=1e-6)


@pytest.mark.parametrize("name", ["med-moe", "med-moe-phi"])
def test_a_meta_expert_stands_beside_the_average(name: str, tmp_path: Path) -> None:
    """The wider MLP is mean gate times the averaged expert, plus the meta expert; a dense layer,
    widened by zeros, stays what it was.
    """
    model = write(tmp_path / "model", name)
    notes = dense(model, tmp_path / "out", **CALIBRATION)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    at = "model.layers.{}.mlp."
    for n in (0, 2):
        stem = at.format(n)
        mean = {
            key.replace(f"{EXPERT}0.", ""): torch.stack(
                [before[key.replace(f"{EXPERT}0.", f"{EXPERT}{j}.")] for j in range(4)]
            ).mean(0)
            for key in before
            if f"{stem}{EXPERT}0." in key
        }
        gate = notes["layers"][f"layers.{n}"]["gate"]
        assert 0.25 < gate < 1
        assert (
            one_mlp(after, stem, x)
            - gate * one_mlp(mean, stem, x)
            - one_mlp(before, f"{stem}{META}", x)
        ).abs().max() < 1e-4
    assert (one_mlp(after, at.format(1), x) - one_mlp(before, at.format(1), x)).abs().max() < 1e-5
    assert notes["wider"] == 2
    assert (
        CanonicalWeights(open_checkpoint(tmp_path / "out")).decoder.ffn
        == 2 * CanonicalWeights(open_checkpoint(model)).decoder.ffn
    )


def test_the_error_is_what_one_layer_shows(tmp_path: Path) -> None:
    """In a model of one layer, what the layer adds is all that differs: the same error from the two
    models' hidden states, computed by other code.
    """
    from moe_models import sparse

    from edgemed.data.text_sets import calibration_sequences
    from edgemed.models.tokenizer import open_tokenizer

    model = write(tmp_path / "model", "moe-tinymed", num_hidden_layers=1)
    notes = dense(model, tmp_path / "out", **CALIBRATION)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    source = reference(model, config, "StableLm")
    read = []
    source.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    windows = calibration_sequences(
        "medquad-answers", open_tokenizer(model, config["vocab_size"]), 4, 32
    )
    with torch.inference_mode():
        source(input_ids=torch.tensor(windows))
    right = sparse(before, "model.layers.0.mlp.", read[0])
    found = one_mlp(after, "model.layers.0.mlp.", read[0])
    assert notes["layers"]["layers.0"]["error"] == pytest.approx(
        float((found - right).norm() / right.norm()), rel=1e-4
    )


@pytest.mark.parametrize("name", ["moe-tinymed", "med-moe-phi"])
def test_the_dense_model_exports_to_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import numpy as np

    from edgemed import plugins

    dense(write(tmp_path / "model", name), tmp_path / "out", **CALIBRATION)
    checkpoint = open_checkpoint(tmp_path / "out")
    onnx = plugins.load("targets", "onnx")
    session = export(checkpoint, "onnx", onnx.Params(precision="fp32"), tmp_path / "engine").open()
    assert (
        np.abs(
            session.prefill(IDS, every=True)
            - TorchSession(CanonicalWeights(checkpoint)).prefill(IDS, every=True)
        ).max()
        < 1e-3
    )


def test_float16_is_written_where_asked_and_the_sources_dtype_where_not(tmp_path: Path) -> None:
    model = rewrite(
        write(tmp_path / "source", "moe-tinymed"),
        tmp_path / "model",
        lambda found: {k: v if ROUTER in k else v.bfloat16() for k, v in found.items()},
    )
    dense(model, tmp_path / "same")
    dense(model, tmp_path / "half", dtype="float16")
    for name, dtype in (("same", "bfloat16"), ("half", "float16")):
        assert {entry.dtype for entry in open_checkpoint(tmp_path / name).tensors.values()} == {
            dtype
        }
    assert (
        json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))["dtype"]
        == "float16"
    )


@pytest.mark.parametrize(
    ("name", "kind", "params", "words"),
    [
        ("moe-tinymed", "llava_stablelm", {}, "has no mixtures of experts"),
        ("med-moe", "moe_llava_stablelm", {}, "gates do not sum to one"),
        (
            "moe-tinymed",
            "moe_llava_stablelm",
            {"calibration": "medquad-answers", "length": 4096},
            "for a context of",
        ),
        ("moe-tinymed", "moe_llava_stablelm", {"weights": "usage"}, "needs calibration"),
        ("moe-tinymed", "moe_llava_stablelm", {"adapter": "lora"}, "both adapter and experts"),
        ("moe-tinymed", "moe_llava_stablelm", {"alpha": 0.5}, "alpha 0.5"),
        ("moe-tinymed", "moe_llava_stablelm", {"calibration": "nothing.jsonl"}, "does not exist"),
    ],
)
def test_what_is_refused(name: str, kind: str, params: dict, words: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", name, model_type=kind)
    with pytest.raises(EdgemedError, match=words):
        dense(model, tmp_path / "out", **params)
    assert not any((tmp_path / "out").iterdir()), (
        "nothing is written that would have to be thrown away"
    )


def test_neither_and_what_only_experts_take() -> None:
    for params, words in (
        ({}, "neither adapter nor experts"),
        ({"adapter": "lora", "calibration": "medquad-answers"}, "are for experts"),
    ):
        with pytest.raises(EdgemedError, match=words):
            merge.inputs(merge.Params(**params))


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    from edgemed.steps import quantize

    (tmp_path / "int4").mkdir()
    quantize.run(
        open_checkpoint(write(tmp_path / "model", "moe-tinymed")),
        tmp_path / "int4",
        quantize.Params("rtn", group=32),
    )
    with pytest.raises(EdgemedError, match="is quantized"):
        dense(tmp_path / "int4", tmp_path / "out")


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "moe-tinymed")
    done = cli("merge", model, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: merge: neither adapter nor experts")
    )
    done = cli("merge", model, "--out", tmp_path / "out", "--experts", "dense", "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert "layers.2" in json.dumps(manifest)
    assert CanonicalWeights(open_checkpoint(tmp_path / "out")).decoder.experts is None
