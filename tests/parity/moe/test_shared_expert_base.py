"""Experts as a shared matrix and differences: the checkpoint against numpy, every engine against
the reference, what is nearest, and what is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, rewrite, tokens
from moe_models import EXPERT, MODELS, reference, write

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from edgemed import params as strict
from edgemed import plugins
from edgemed.engines.engine import export
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import TorchSession, logits
from edgemed.models.weights import CanonicalWeights
from edgemed.moe import shared_expert_base
from edgemed.planning import inspect
from edgemed.steps import merge, quantize

IDS = tokens(40)
CALIBRATION = {"calibration": "medquad-answers", "samples": 4, "length": 32}
FORMS = [{"rank": 6}, {"density": 0.25}]


def shared(model: Path, out: Path, **params: object) -> dict:
    out.mkdir()
    values = {"experts": "shared_delta", **params}
    return merge.run(open_checkpoint(model), out, strict.build(merge.Params, values, "merge"))


def scores(path: Path, sum_experts: bool = False) -> torch.Tensor:
    weights = CanonicalWeights(open_checkpoint(path), sum_experts=sum_experts)
    return logits(weights, torch.tensor([IDS]))[0]


def expanded(path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint in its authors' layout, summed here by hand from what is on disk."""
    stored = load_file(path / "model.safetensors")
    found = {
        key: value
        for key, value in stored.items()
        if "_delta." not in key and "experts.base." not in key
    }
    for key in (key for key in stored if "experts.base." in key):
        at = key.split("experts.base.")[0] + "experts."
        module = key.split("experts.base.")[1].removesuffix(".weight")
        last = "down" if module in ("down_proj", "fc2", "c_proj") else "up"
        for j in range(4):
            start = f"{at}deepspeed_experts.{j}.{last}_delta."
            if f"{start}a" in stored:
                rest = stored[f"{start}b"].numpy() @ stored[f"{start}a"].numpy()
            else:
                values = stored[f"{start}values"].numpy()
                columns = stored[f"{start}columns"].numpy()
                rest = np.zeros((len(values), stored[key].shape[1]), np.float32)
                for row in range(len(values)):
                    rest[row, columns[row]] = values[row]
            half = len(stored[key])
            own = rest[half:] if module in ("up_proj", "w1") else rest[:half]
            found[f"{at}deepspeed_experts.{j}.{module}.weight"] = stored[key] + torch.tensor(own)
    return found


@pytest.mark.parametrize("form", FORMS, ids=["rank", "density"])
@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoint_is_the_model_with_summed_experts(
    name: str, form: dict, tmp_path: Path
) -> None:
    model = write(tmp_path / "model", name)
    notes = shared(model, tmp_path / "out", **form, **CALIBRATION)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["moe"].pop("shared_delta") == form
    assert set(notes["layers"]) == {
        "layers.0",
        "layers.2",
    }
    plain = rewrite(tmp_path / "out", tmp_path / "plain", lambda _: expanded(tmp_path / "out"))
    (plain / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        right = reference(plain, config, MODELS[name][0])(input_ids=torch.tensor([IDS])).logits[0]
    assert (scores(tmp_path / "out") - right).abs().max() < 1e-4, "shared matrices multiplied once"
    assert (scores(tmp_path / "out", sum_experts=True) - right).abs().max() < 1e-4, (
        "experts summed when they are read"
    )
    before = load_file(model / "model.safetensors")
    after = load_file(plain / "model.safetensors")
    assert set(before) == set(after)
    assert all(
        torch.equal(before[key], after[key])
        for key in before
        if "deepspeed_experts" not in key or key.endswith(".bias")
    )
    session = TorchSession(CanonicalWeights(open_checkpoint(tmp_path / "out")))
    assert np.abs(session.prefill(IDS[:30], every=True) - right[:30].numpy()).max() < 1e-4
    assert np.abs(session.step(IDS[30]) - right[30].numpy()).max() < 1e-4


def test_of_full_rank_nothing_is_lost(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "moe-tinymed")
    notes = shared(model, tmp_path / "out", rank=64, **CALIBRATION)
    assert (scores(tmp_path / "out") - scores(model)).abs().max() < 1e-3
    assert all(found["error"] < 1e-3 for found in notes["layers"].values())


def test_low_rank_is_the_nearest_on_what_is_read() -> None:
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(24, 16, generator=generator)
    x = torch.randn(400, 16, generator=generator) @ torch.diag(torch.linspace(0.05, 3, 16))
    moment = 2 * x.T @ x / len(x)
    found = {
        kind: (lambda f: f["b"] @ f["a"])(shared_expert_base.low_rank(rest, second, 4))
        for kind, second in (("read", moment), ("plain", torch.eye(16)))
    }
    left, sizes, right = np.linalg.svd(rest.numpy(), full_matrices=False)
    assert np.abs(found["plain"].numpy() - (left[:, :4] * sizes[:4]) @ right[:4]).max() < 1e-4
    errors = {kind: float(((rest - matrix) @ x.T).norm()) for kind, matrix in found.items()}
    # What no matrix of this rank falls below: the singular values of the outputs themselves.
    bound = float(np.sqrt((np.linalg.svd((rest @ x.T).numpy(), compute_uv=False)[4:] ** 2).sum()))
    assert bound <= errors["read"] * 1.0001
    assert errors["read"] < 1.01 * bound
    assert errors["plain"] > 1.1 * bound
    assert np.linalg.matrix_rank(found["read"].numpy(), tol=1e-3) == 4


def test_sparse_keeps_what_weighs_most_in_each_row() -> None:
    rest = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    found = shared_expert_base.sparse(rest, torch.diag(torch.tensor([1.0, 100.0, 1.0, 0.01])), 2)
    assert found["columns"].tolist() == [[0, 1], [1, 2]]
    assert torch.equal(found["values"], torch.tensor([[3.0, -1.0], [0.2, -0.3]]))


@pytest.mark.parametrize("form", FORMS, ids=["rank", "density"])
def test_calibration_and_usage_make_the_layer_nearer(form: dict, tmp_path: Path) -> None:
    model = write(tmp_path / "model", "moe-tinymed")
    notes = shared(model, tmp_path / "out", weights="usage", **form, **CALIBRATION)
    for found in notes["layers"].values():
        assert found["shares"] == [count / sum(found["tokens"]) for count in found["tokens"]]
        assert 0.05 < found["error"] < 1
    (tmp_path / "dense").mkdir()
    averaged = merge.run(
        open_checkpoint(model),
        tmp_path / "dense",
        merge.Params(experts="dense", weights="usage", **CALIBRATION),
    )
    assert all(
        notes["layers"][name]["error"] < averaged["layers"][name]["error"]
        for name in averaged["layers"]
    )


@pytest.mark.parametrize("name", ["moe-tinymed", "med-moe-phi"])
def test_gptq_rounds_the_shared_matrices_and_keeps_the_differences(
    name: str, tmp_path: Path
) -> None:
    model = write(tmp_path / "model", name)
    shared(model, tmp_path / "out", rank=6, **CALIBRATION)
    (tmp_path / "int8").mkdir()
    notes = quantize.run(
        open_checkpoint(tmp_path / "out"),
        tmp_path / "int8",
        quantize.Params(
            "gptq",
            bits=8,
            group=64,
            **CALIBRATION,
        ),
    )
    assert {"layers.0.base.up", "layers.0.base.down"} <= set(notes["errors"])
    assert not any(".experts." in key for key in notes["errors"])
    before = load_file(tmp_path / "out" / "model.safetensors")
    after = load_file(tmp_path / "int8" / "model.safetensors")
    assert all(torch.equal(after[key], before[key].half()) for key in before if "_delta." in key)
    assert any("experts.base" in key and key.endswith("qweight") for key in after)
    right = scores(tmp_path / "out")
    assert (scores(tmp_path / "int8") - right).square().mean() < 0.02 * right.square().mean()
    for values, words in (
        ({"method": "awq", **CALIBRATION}, "awq does not know experts"),
        ({"method": "gptq", "budget": "4.5bpw", **CALIBRATION}, "a budget does not know experts"),
    ):
        with pytest.raises(EdgemedError, match=words):
            quantize.run(
                open_checkpoint(tmp_path / "out"),
                tmp_path / "int8",
                quantize.Params(**values, group=64),
            )


@pytest.mark.parametrize("name", ["moe-tinymed", "med-moe", "med-moe-phi"])
def test_onnx_multiplies_the_shared_matrix_once(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx

    shared(write(tmp_path / "model", name), tmp_path / "out", rank=6, **CALIBRATION)
    checkpoint = open_checkpoint(tmp_path / "out")
    target = plugins.load("targets", "onnx")
    right = scores(tmp_path / "out").numpy()
    engine = export(checkpoint, "onnx", target.Params(precision="fp32"), tmp_path / "fp32")
    session = engine.open()
    assert np.abs(session.prefill(IDS, every=True) - right).max() < 1e-3
    session.rewind(0)
    assert np.abs(session.prefill(IDS[:9])[0] - right[8]).max() < 1e-3
    assert np.abs(session.step(IDS[9]) - right[9]).max() < 1e-3
    engine = export(
        checkpoint,
        "onnx",
        target.Params(precision="int8", group=64, accuracy_level=1),
        tmp_path / "int8",
    )
    # A token whose experts are close may go to another one.
    assert np.median(np.abs(engine.open().prefill(IDS, every=True) - right)) < 0.1
    names = [
        node.name
        for node in onnx.load(engine.path / "model.onnx", load_external_data=False).graph.node
        if node.op_type == "MatMulNBits" and node.name.startswith("layers.0.")
    ]
    assert sum("base." in node for node in names) == 2
    assert sum(".experts." in node for node in names) == 4 * 4


@pytest.mark.parametrize(
    ("target", "values", "form"),
    [
        ("onnx", {"precision": "fp32"}, {"density": 0.25}),
        ("tensorrt", {"precision": "fp32"}, {"rank": 6}),
        ("llamacpp", {"type": "f32"}, {"rank": 6}),
        ("llamacpp", {"type": "f32"}, {"density": 0.25}),
    ],
)
def test_other_targets_read_whole_experts(
    target: str, values: dict, form: dict, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp" if target == "llamacpp" else "onnxruntime")
    for name in ("moe-tinymed", "med-moe") if target == "llamacpp" else ("moe-tinymed",):
        out = tmp_path / name
        shared(write(tmp_path / f"{name}-model", name), out, **form, **CALIBRATION)
        engine = export(
            open_checkpoint(out),
            target,
            plugins.load("targets", target).Params(**values),
            tmp_path / f"{name}-engine",
        )
        assert np.abs(engine.open().prefill(IDS, every=True) - scores(out).numpy()).max() < 5e-3
    with pytest.raises(EdgemedError, match="whole ones here"):
        export(
            open_checkpoint(out),
            "llamacpp",
            plugins.load("targets", "llamacpp").Params(from_checkpoint=True),
            tmp_path / "no",
        )


def test_what_is_stored_is_smaller_and_counted(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "moe-tinymed")
    shared(model, tmp_path / "out", rank=6)
    found = {name: inspect.inspect(str(tmp_path / name)) for name in ("model", "out")}
    stored = sum(
        value.numel() for value in load_file(tmp_path / "out" / "model.safetensors").values()
    )
    spare = sum(
        value.numel()
        for key, value in load_file(tmp_path / "out" / "model.safetensors").items()
        if key.endswith("position_ids")
    )
    assert found["out"]["parameters"] == stored - spare < found["model"]["parameters"]
    int4 = {
        name: [row["weights_mb"] for key, row in facts["memory"].items() if key.startswith("int4")]
        for name, facts in found.items()
    }
    assert len(int4["out"]) == len(int4["model"]) == 1
    assert int4["out"] < int4["model"]
    d = inspect.dimensions(CanonicalWeights(open_checkpoint(tmp_path / "out")))
    assert d.expert == 6 * (64 + 256) + 6 * (128 + 64)
    assert d.experts == 4


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "neither rank nor density"),
        ({"rank": 4, "density": 0.1}, "both rank and density"),
        ({"rank": 0}, "rank: 0 is out of range. Give a number at least 1"),
        ({"rank": -3}, "rank: -3 is out of range"),
        ({"rank": 65}, "rank 65 is above that of the experts' matrices, 64"),
        ({"density": 0.0}, "density: 0.0 is out of range. Give a number above 0, below 1"),
        ({"density": 1.0}, "density: 1.0 is out of range"),
        ({"rank": 4, "weights": "usage"}, "needs calibration"),
        ({"rank": 4, "calibration": "none.jsonl"}, "does not exist"),
        ({"rank": 4, "calibration": "medquad-answers", "length": 4096}, "for a context of"),
    ],
)
def test_what_is_refused(params: dict, words: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", "moe-tinymed")
    with pytest.raises(EdgemedError, match=words) as error:
        shared(model, tmp_path / "out", **params)
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "out").iterdir())


def test_models_it_is_not_for(tmp_path: Path) -> None:
    with pytest.raises(EdgemedError, match="has no mixtures of experts"):
        shared(
            write(tmp_path / "dense", "moe-tinymed", model_type="llava_stablelm"),
            tmp_path / "one",
            rank=4,
        )
    shared(write(tmp_path / "model", "moe-tinymed"), tmp_path / "once", rank=4)
    with pytest.raises(EdgemedError, match="share a matrix already"):
        shared(tmp_path / "once", tmp_path / "twice", rank=4)
    with pytest.raises(EdgemedError, match="rank and density are for experts: shared_delta"):
        merge.inputs(merge.Params(experts="dense", rank=4))


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    shared(write(tmp_path / "model", "moe-tinymed"), tmp_path / "rank", rank=4)
    shared(tmp_path / "model", tmp_path / "density", density=0.25)
    config = json.loads((tmp_path / "rank" / "config.json").read_text())
    for said in ({"rank": 4, "density": 0.1}, {}, {"rank": -1}, {"density": 2}, "4", {"rank": "4"}):
        (tmp_path / "rank" / "config.json").write_text(
            json.dumps(config | {"moe": config["moe"] | {"shared_delta": said}})
        )
        with pytest.raises(EdgemedError, match="neither a rank nor a density"):
            CanonicalWeights(open_checkpoint(tmp_path / "rank"))
    (tmp_path / "rank" / "config.json").write_text(
        json.dumps(config | {"moe": config["moe"] | {"shared_delta": {"rank": 5}}})
    )
    with pytest.raises(EdgemedError, match=r"has shape \[4, 64\], config.json asks for \[5, 64\]"):
        CanonicalWeights(open_checkpoint(tmp_path / "rank"))
    stored = load_file(tmp_path / "density" / "model.safetensors")
    key = f"model.layers.2.mlp.{EXPERT}1.down_delta.columns"
    stored[key][3, 5] = 128
    save_file(stored, tmp_path / "density" / "model.safetensors")
    with pytest.raises(
        EdgemedError,
        match="experts.1.down_delta.columns' names columns that a row of 128 does not have",
    ):
        scores(tmp_path / "density")


def test_the_command_line(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "moe-tinymed")
    done = cli(
        "merge",
        model,
        "--out",
        tmp_path / "out",
        "--experts",
        "shared_delta",
        "--set",
        "rank=8",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert CanonicalWeights(open_checkpoint(tmp_path / "out")).decoder.experts.rank == 8
    done = cli("merge", model, "--out", tmp_path / "no", "--experts", "shared_delta")
    assert done.returncode == 1
    assert "neither rank nor density" in done.stderr.strip().splitlines()[-1]
