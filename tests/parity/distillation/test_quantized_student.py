"""Training the scales of a quantized checkpoint: the student computes what the integers stand for,
only scales (and norms) move, and a killed run ends with the same bytes.

Scores come from transformers, where the training happens, and from our own decoder, which reads the
packed files: each checks the other.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from calibration_texts import section_texts
from conftest import VOCAB, cli, distilled_whole_and_killed, refused, tokens, write_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from edgemed import params as strict
from edgemed.artifacts import hashing, store
from edgemed.distillation import quantized_student, student
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import distill, quantize

IDS = torch.tensor([tokens(40), tokens(40, seed=1)])
FAMILIES = {
    "gpt2": {},
    "llama": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return section_texts(tmp_path_factory.mktemp("refit") / "text.jsonl")


def packed(model: Path, out: Path, bits: int, group: int = 32) -> Path:
    return run_step(
        Stage("quantize", quantize.Params("rtn", bits, group)),
        open_checkpoint(model),
        out.parent,
        out,
    ).path


def small(text: str, **changes: object) -> distill.Params:
    return distill.Params(
        **{
            "calibration": text,
            "steps": 8,
            "rate": 3e-3,
            "length": 48,
            "batch": 4,
            "evaluate_every": 4,
            "train": "scales",
            **changes,
        }
    )


def run(model: Path, out: Path, params: distill.Params) -> dict:
    return store.read_manifest(
        run_step(Stage("distill", params), open_checkpoint(model), out.parent, out).path
    )["notes"]


def opened(
    path: Path, folder: Path, norms: bool = False
) -> tuple[CanonicalWeights, torch.nn.Module]:
    weights = CanonicalWeights(open_checkpoint(path))
    model = student.load(weights, quantized_student.write_dequantized(weights, folder))
    quantized_student.freeze(model, weights, norms)
    return weights, model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 64), (8, -1)])
def test_the_student_computes_what_its_integers_stand_for(
    family: str, bits: int, group: int, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "model", family=family, **FAMILIES[family])
    weights, model = opened(packed(source, tmp_path / "packed", bits, group), tmp_path / "expanded")
    with torch.no_grad():
        right = logits(weights, IDS)
        assert (model(input_ids=IDS).logits - right).abs().max() < 1e-4 * right.abs().max()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        count
        == quantized_student.trained_summary(weights, False)["scales"]
        == sum(
            m.scales.numel()
            for name in weights.parts
            if name.startswith("layers.") and weights.parts[name].kind == "matrix"
            for m in [weights.matrix(name)]
        )
    )


def test_the_gradient_of_a_scale_is_its_finite_difference(model: Path, tmp_path: Path) -> None:
    _weights, student = opened(packed(model, tmp_path / "packed", 3), tmp_path / "expanded")
    student = student.double()
    delta = student.transformer.h[1].mlp.c_fc.parametrizations.weight.original

    def loss() -> torch.Tensor:
        return torch.log_softmax(student(input_ids=IDS).logits, -1)[..., 7].mean()

    loss().backward()
    place = (5, 1)
    step = 1e-4
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            delta[place] = sign * step
            ends.append(float(loss()))
    assert float(delta.grad[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("train", ["scales", "scales+norms"])
def test_integers_stay_and_the_divergence_falls(
    train: str, model: Path, text: str, tmp_path: Path
) -> None:
    start = packed(model, tmp_path / "packed", 2)
    notes = run(start, tmp_path / "out", small(text, teacher=str(model), train=train, steps=24))
    before = open_checkpoint(start)
    after = open_checkpoint(tmp_path / "out")
    changed = {
        name.split(".", 2)[2].split(".", 1)[1] if ".h." in name else name
        for name in before.tensors
        if not torch.equal(before.read(name), after.read(name))
    }
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    norms = (
        "ln_1.weight",
        "ln_1.bias",
        "ln_2.weight",
        "ln_2.bias",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    )
    assert changed == {f"{m}.scales" for m in matrices} | (
        {f"{m}.bias" for m in matrices} | set(norms) if train == "scales+norms" else set()
    )
    assert before.tensors.keys() == after.tensors.keys()
    assert before.config == after.config
    assert notes["after"]["kl"] < 0.9 * notes["before"]["kl"]
    assert notes["written"]["max_abs_error"] < 1e-4 * notes["written"]["largest_score"]
    # What the notes say is what the two files do, against the source, on the very windows.
    assert notes["trained"]["scales"] == sum(
        before.tensors[n].shape[0] * before.tensors[n].shape[1]
        for n in before.tensors
        if n.endswith(".scales")
    )
    right = torch.log_softmax(logits(CanonicalWeights(open_checkpoint(model)), IDS), -1)
    divergences = [
        float(
            (right.exp() * (right - torch.log_softmax(logits(CanonicalWeights(c), IDS), -1)))
            .sum(-1)
            .mean()
        )
        for c in (before, after)
    ]
    assert np.isfinite(divergences).all()
    assert divergences[0] > 0


def test_engines_carry_the_trained_scales(model: Path, text: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from edgemed.engines.engine import export
    from edgemed.targets.onnx import Params

    run(packed(model, tmp_path / "packed", 4), tmp_path / "out", small(text, teacher=str(model)))
    trained = open_checkpoint(tmp_path / "out")
    engine = export(trained, "onnx", Params(accuracy_level=1), tmp_path / "engine")
    session = engine.open(1)
    found = session.prefill(IDS[0].tolist(), every=True).copy()
    session.close()
    right = logits(CanonicalWeights(trained), IDS[:1])[0].numpy()
    assert engine.precision == "int4 g32"
    assert found.shape == (40, VOCAB)
    # embedding and output matrix are rounded besides
    assert np.corrcoef(found.ravel(), right.ravel())[0, 1] > 0.9999


def test_a_recipe_finds_the_float_checkpoint_by_itself(
    model: Path, text: str, tmp_path: Path
) -> None:
    """As in the store of a run: merge's result, its quantization and its distillation lie side by
    side.
    """
    float_copy = run_step(
        Stage(
            "distill",
            small(text, train="weights", layers=(1,), rate=1e-5, steps=1, evaluate_every=1),
        ),
        open_checkpoint(model),
        tmp_path,
        tmp_path / "float",
    ).path
    start = packed(float_copy, tmp_path / "packed", 3)
    notes = run(start, tmp_path / "out", small(text))
    assert notes["teacher"] == hashing.digest(open_checkpoint(float_copy).hashes())


@pytest.mark.kill
def test_a_killed_run_ends_with_the_same_bytes(model: Path, text: str, tmp_path: Path) -> None:
    start = packed(model, tmp_path / "packed", 3)
    asked = [start, "--teacher", model, "--calibration", text, "--steps", 40, "--rate", 3e-3]
    asked += [
        part
        for value in ("length=48", "batch=4", "evaluate_every=4", "train=scales+norms")
        for part in ("--set", value)
    ]
    whole, killed = (
        (out / "model.safetensors").read_bytes()
        for out in distilled_whole_and_killed(asked, tmp_path)
    )
    assert whole == killed


def test_what_is_refused(model: Path, vision_model: Path, text: str, tmp_path: Path) -> None:
    start = packed(model, tmp_path / "packed", 4)
    quick = [
        "--calibration",
        text,
        "--steps",
        1,
        "--rate",
        1e-3,
        "--out",
        tmp_path / "out",
        "--set",
    ]
    refused(
        cli("distill", model, "--teacher", model, *quick, "train=scales"),
        "train: scales is for quantized students",
        "holds floats",
    )
    refused(cli("distill", start, *quick, "train=everything"), "train")
    moved = tmp_path / "alone" / "packed"
    moved.parent.mkdir()
    os.rename(start, moved)
    refused(
        cli("distill", moved, *quick, "train=scales"),
        "was quantized from is not known",
        "Name it as teacher",
    )
    with pytest.raises(EdgemedError, match="layers, ffn, .*and a merged lora"):
        distill.inputs(small(text, lora=4))
    seeing = packed(vision_model, tmp_path / "seeing", 4)
    with pytest.raises(EdgemedError, match="is for text models without experts"):
        run(seeing, tmp_path / "out", small(text, teacher=str(vision_model)))
    assert (
        strict.build(
            distill.Params,
            {"calibration": text, "steps": 1, "rate": 1e-3, "train": "scales+norms"},
            "distill",
        ).train
        == "scales+norms"
    )
