"""The witness is asked about every float checkpoint that a recipe makes, about GGUF files and about
random weights, before anything is built from them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import cli, refused

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from edgemed.artifacts import store
from edgemed.documents.witness import WitnessResult
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline import runner
from edgemed.verification.witness import reading, witness


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    path = tmp_path_factory.mktemp("witnessed") / "adapter"
    adapted.save_pretrained(path)
    return path


def write_recipe(path: Path, model: Path, adapter: Path) -> Path:
    engines = [
        {"onnx": {"name": "plain", "from": "model", "precision": "fp32"}},
        {"onnx": {"name": "merged", "from": "merge", "precision": "fp32"}},
        {"onnx": {"name": "quantized"}},
    ]
    steps = [
        {"merge": {"adapter": str(adapter)}},
        {"quantize": {"method": "rtn", "bits": 4, "group": 32}},
    ]
    path.write_text(json.dumps({"model": str(model), "steps": steps, "engines": engines}))
    return path


def test_every_float_checkpoint_of_a_recipe(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: dict[str, WitnessResult] = {}
    original = witness.compared

    def keep(checkpoint: Checkpoint, memory: int | None, adapters: dict[str, str]) -> WitnessResult:
        result = original(checkpoint, memory, adapters)
        compared[checkpoint.path.name.split("-")[0]] = result
        return result

    monkeypatch.setattr(witness, "compared", keep)
    work = tmp_path / "work"
    done = cli("run", write_recipe(tmp_path / "recipe.yaml", model, adapter), "--work", work)
    assert done.returncode == 0, done.stderr
    assert list(compared) == ["model", "merge"]
    notes = {
        name: store.open_manifest(work / "engines" / name).notes["witness"]
        for name in ("plain", "merged", "quantized")
    }
    assert notes["plain"] == compared["model"].to_json()
    assert notes["merged"] == notes["quantized"] == compared["merge"].to_json()
    assert compared["merge"].passed
    assert compared["merge"].layers


def test_a_merged_checkpoint_that_is_misread(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reading.stop_ids

    def misread(weights: CanonicalWeights) -> set[int]:
        is_merged = weights.checkpoint.path.name.startswith("merge-")
        return set() if is_merged else original(weights)

    monkeypatch.setattr(reading, "stop_ids", misread)
    work = tmp_path / "work"
    done = cli("run", write_recipe(tmp_path / "recipe.yaml", model, adapter), "--work", work)
    refused(done, "store/merge-", "is read otherwise", "Nothing was built")
    assert not (work / "engines").exists()


@pytest.mark.parametrize("verb", ["witness", "verify"])
def test_a_gguf_file_is_imported_first(model: Path, tmp_path: Path, verb: str) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "engine"
    done = cli("export", model, "--target", "llamacpp", "--out", out, "--prompts", "none")
    assert done.returncode == 0, done.stderr
    file = next(out.glob("*.gguf"))
    before = sorted(out.iterdir())
    done = cli(verb, file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    assert sorted(out.iterdir()) == before
    refused(cli(verb, tmp_path / "missing.gguf"), "missing.gguf")


def test_random_weights_are_witnessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    def small(name: str, cache: Path) -> Checkpoint:
        assert name == "random:tiny"
        return open_model(str(model), cache)

    open_model = runner.open_model
    monkeypatch.setattr(runner, "open_model", small)
    engine = runner.random_engine("tiny", "onnx", {"precision": "fp32"}, tmp_path)
    assert WitnessResult.from_json(store.open_manifest(engine).notes["witness"]).passed
    monkeypatch.setattr(reading, "stop_ids", lambda weights: set())
    monkeypatch.setattr(witness, "read_entry", lambda final: None)
    with pytest.raises(EdgemedError, match="is read otherwise"):
        runner.random_engine("tiny", "onnx", {"precision": "fp32"}, tmp_path)
