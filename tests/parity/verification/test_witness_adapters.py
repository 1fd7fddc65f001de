"""Switchable adapters beside peft: right ones pass in every family, wrong readings are named, and
no engine carries one that is misread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import cli, refused, write_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from edgemed.artifacts import store
from edgemed.documents.witness import WitnessResult, WitnessRow
from edgemed.models import lora
from edgemed.models.checkpoint import open_checkpoint
from edgemed.verification.witness import scores, witness
from edgemed.verification.witness.comparison import compare

PLENTY = 1 << 30
TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "phi": ["q_proj", "k_proj", "dense", "fc2"],
}
Write = Callable[..., Path]


@pytest.fixture
def write_adapter(tmp_path: Path) -> Write:
    """Writes a trained LoRA for a model and returns its directory."""

    def write(model: Path, name: str, family: str = "gpt2", **changes: object) -> Path:
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS[family], **changes}
        config = peft.LoraConfig(**settings, fan_in_fan_out=family == "gpt2")
        adapted = peft.get_peft_model(base, config)
        for parameter, value in adapted.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(value, std=0.2)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def row_of(result: WitnessResult, name: str) -> WitnessRow:
    return next(row for row in result.rows if row.what == f"adapter {name}")


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_are_read_as_peft_reads_them(
    family: str, tmp_path: Path, write_adapter: Write
) -> None:
    model = write_model(tmp_path / "model", family=family)
    first = TARGETS[family][0]
    adapters = {
        "plain": str(write_adapter(model, "plain", family)),
        "patterns": str(
            write_adapter(
                model,
                "patterns",
                family,
                use_rslora=True,
                rank_pattern={first: 2},
                alpha_pattern={first: 20},
            )
        ),
    }
    result = compare(open_checkpoint(model), PLENTY, adapters)
    assert result.passed, result.first
    for name in adapters:
        row = row_of(result, name)
        assert row.comparisons == 2 * len(scores.PLACES)
        assert row.note == f"peft {peft.__version__}"


def test_few_layers_with_an_adapter(tmp_path: Path, write_adapter: Write) -> None:
    model = write_model(tmp_path / "model", n_layer=6)
    adapters = {
        "every": str(write_adapter(model, "every")),
        "inner": str(write_adapter(model, "inner", layers_to_transform=[2, 3])),
    }
    whole = compare(open_checkpoint(model), PLENTY, adapters)
    assert len(whole.layers) == 6
    assert whole.passed, whole.first
    assert row_of(whole, "inner").comparisons
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    few = compare(open_checkpoint(model), size, adapters)
    assert len(few.layers) < 6
    assert few.passed, few.first
    assert row_of(few, "every").comparisons == row_of(whole, "every").comparisons
    assert "no layer that was computed" in (row_of(few, "inner").note or "")


def test_a_scale_that_is_misread(
    model: Path, tmp_path: Path, write_adapter: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(model, "sections", use_rslora=True)
    right = lora.lora_scale
    monkeypatch.setattr(lora, "lora_scale", lambda *args: right(*args) * 0.9)
    out = tmp_path / "engine"
    arguments = ("--target", "onnx", "--out", out, "--adapter", f"sections={adapter}")
    line = refused(cli("export", model, *arguments), "is read otherwise")
    assert "adapter 'sections', text, token 0: scores differ" in line
    assert not out.exists()


def test_another_adapter_asks_anew(model: Path, tmp_path: Path, write_adapter: Write) -> None:
    checkpoint = open_checkpoint(model)
    adapters = {"sections": str(write_adapter(model, "sections"))}
    cache = tmp_path / "cache"
    plain = witness.witness(checkpoint, cache)
    assert not [row for row in plain.rows if row.what.startswith("adapter")]
    result = witness.witness(checkpoint, cache, adapters=adapters)
    assert row_of(result, "sections").comparisons
    moved = shutil.copytree(adapters["sections"], tmp_path / "moved")
    assert witness.witness(checkpoint, cache, adapters={"sections": str(moved)}) == result
    assert len(list(cache.glob("witness-*"))) == 2


@pytest.mark.process
def test_a_large_model_with_an_adapter(
    model: Path, write_adapter: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = {"sections": str(write_adapter(model, "sections"))}
    monkeypatch.setattr(witness, "SMALL", 0)
    result = witness.compared(open_checkpoint(model), None, adapters)
    assert row_of(result, "sections").comparisons


def test_a_quantized_engine_of_a_recipe(model: Path, tmp_path: Path, write_adapter: Write) -> None:
    adapters = {"sections": str(write_adapter(model, "sections"))}
    recipe = tmp_path / "recipe.yaml"
    steps = [{"quantize": {"method": "rtn", "bits": 4, "group": 32}}]
    engines = [{"onnx": {"name": "engine", "adapters": adapters}}]
    recipe.write_text(json.dumps({"model": str(model), "steps": steps, "engines": engines}))
    done = cli("run", recipe, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    notes = store.open_manifest(tmp_path / "work" / "engines" / "engine").notes
    row = row_of(WitnessResult.from_json(notes["witness"]), "sections")
    assert row.comparisons == 2 * len(scores.PLACES)
    assert not row.differ
