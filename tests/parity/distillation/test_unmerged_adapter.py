"""A LoRA trained beside the integers of a quantized checkpoint: the checkpoint stays as it was,
engines use the adapter, and it is refused on every other base.

The oracle is peft: transformers' model of the expanded integers with the written adapter on it,
which must say what each engine says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from calibration_texts import section_texts
from conftest import cli, distilled_whole_and_killed, refused, tokens, write_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from edgemed import plugins
from edgemed.artifacts import hashing, store
from edgemed.distillation import quantized_student, student
from edgemed.engines.engine import export
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import ADAPTER, open_checkpoint
from edgemed.models.lora import FOLDED, OWN_BASE, answering, read_lora
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import distill, merge, quantize

IDS = tokens(60)
# Scores divided by the layer's number, which quantize folds into the q rows; grouped heads; and
# inputs that were rescaled.
CASES = {
    "folded": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "rtn"),
    "grouped": ("llama", {"num_key_value_heads": 1}, "rtn"),
    "rescaled": ("gpt2", {}, "awq"),
}
FLOAT32_PARAMS = {"onnx": {"precision": "fp32"}, "llamacpp": {"type": "f32"}}
PRESERVED = {"onnx": {"accuracy_level": 1}, "llamacpp": {"from_checkpoint": True}}


def beside(text: str, **changes: object) -> distill.Params:
    return distill.Params(
        **{
            "calibration": text,
            "steps": 8,
            "rate": 1e-2,
            "length": 48,
            "batch": 4,
            "evaluate_every": 4,
            "train": "lora",
            "lora": 4,
            **changes,
        }
    )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, its 4-bit rounding `packed`, and `out`, that with a LoRA trained beside it whose
    factors B were then made large enough to be seen.
    """
    folder = tmp_path_factory.mktemp(request.param)
    family, config, method = CASES[request.param]
    model = write_model(folder / "model", family=family, **config)
    text = section_texts(folder / "text.jsonl")
    rounded = quantize.Params(
        method,
        4,
        32,
        **({} if method == "rtn" else {"calibration": text, "samples": 4, "length": 32}),
    )
    packed = run_step(Stage("quantize", rounded), open_checkpoint(model), folder, folder / "packed")
    run_step(Stage("distill", beside(text, teacher=str(model))), packed, folder, folder / "out")
    file = folder / "out" / "adapters" / "qad" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(
        {
            name: factor * (20 if "lora_B" in name else 1)
            for name, factor in load_file(file).items()
        },
        file,
        metadata={"format": "pt"},
    )
    return folder


def pefts(folder: Path, work: Path) -> np.ndarray:
    """Scores float32 [60, vocab] of peft's model: the integers as floats, and the adapter in `out`
    on them.
    """
    weights = CanonicalWeights(open_checkpoint(folder / "packed"))
    base = student.load(weights, quantized_student.write_dequantized(weights, work / "expanded"))
    model = peft.PeftModel.from_pretrained(base, folder / "out" / "adapters" / "qad").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", FLOAT32_PARAMS)
def test_an_engine_with_the_adapter_is_the_model_that_was_trained(
    case: Path, target: str, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp" if target == "llamacpp" else "onnxruntime")
    right = pefts(case, tmp_path)
    module = plugins.load("targets", target)
    trained = open_checkpoint(case / "out")
    assert (
        np.abs(logits(answering(trained), torch.tensor([IDS]))[0].numpy() - right).max()
        < 1e-4 * np.abs(right).max()
    )
    engine = export(trained, target, module.Params(**FLOAT32_PARAMS[target]), tmp_path / "engine")
    assert list(engine.adapters) == ["qad"]
    assert engine.default == "qad"
    session = engine.open(1)
    found = session.prefill(IDS, every=True).copy()
    session.use(None)
    base = session.prefill(IDS, every=True).copy()
    session.close()
    rounded = logits(CanonicalWeights(open_checkpoint(case / "packed")), torch.tensor([IDS]))[
        0
    ].numpy()
    bound = 5e-3 if target == "llamacpp" else 1e-5
    assert np.abs(right - rounded).max() > 0.2 * np.abs(right).max(), (
        "the adapter changes little, so little would be tested"
    )
    assert np.abs(found - right).max() < bound * np.abs(right).max()
    assert np.abs(base - rounded).max() < bound * np.abs(right).max()
    named = engine.open(1, "base")
    assert np.array_equal(named.prefill(IDS, every=True), base)
    named.close()
    # The very integers with the adapter: embedding and output matrix are rounded besides.
    carried = export(
        trained, target, module.Params(**PRESERVED[target]), tmp_path / "carried"
    ).open(1)
    found = carried.prefill(IDS, every=True).copy()
    carried.close()
    assert np.abs(found - right).max() < 0.1 * np.abs(right - rounded).max()


def test_the_checkpoint_is_what_it_was_and_names_its_adapter(case: Path) -> None:
    before = open_checkpoint(case / "packed")
    after = open_checkpoint(case / "out")
    assert (case / "packed" / "model.safetensors").read_bytes() == (
        case / "out" / "model.safetensors"
    ).read_bytes()
    assert {**before.config, ADAPTER: "qad"} == after.config
    assert (case / "out" / "tokenizer.json").is_file()
    assert set(after.hashes()) - set(before.hashes()) == {
        "adapters/qad/adapter_config.json",
        "adapters/qad/adapter_model.safetensors",
    }
    said = json.loads((case / "out" / "adapters" / "qad" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] is None
    assert said["r"] == 4
    assert len(said[OWN_BASE]) == 64
    assert str(case) not in json.dumps(said)


def test_what_is_folded_into_the_base_is_not_folded_into_its_own_adapter(case: Path) -> None:
    """The training saw the folded q rows; on the float base the same file would have to be folded,
    and is refused there instead.
    """
    packed = CanonicalWeights(open_checkpoint(case / "packed"))
    factors = read_lora(packed, "a", str(case / "out" / "adapters" / "qad")).factors
    raw = peft.load_peft_weights(str(case / "out" / "adapters" / "qad"))
    name = next(
        key
        for key in raw
        if "1." in key and key.endswith(("c_attn.lora_B.weight", "q_proj.lora_B.weight"))
    )
    b = raw[name].float() * 2  # alpha / rank
    assert torch.equal(factors["layers.1.qkv"][1][: b.shape[0], : b.shape[1]], b)
    assert (FOLDED in packed.checkpoint.config) == (case.name[:6] != "groupe")


def test_every_other_base_is_refused(case: Path, tmp_path: Path) -> None:
    adapter = str(case / "out" / "adapters" / "qad")
    onnx = plugins.load("targets", "onnx").Params
    other = run_step(
        Stage("quantize", quantize.Params("rtn", 8, 32)),
        open_checkpoint(case / "model"),
        tmp_path,
        tmp_path / "other",
    )
    for base in (other, open_checkpoint(case / "model")):
        with pytest.raises(
            EdgemedError,
            match="trained beside the integers of one quantized checkpoint.*is another",
        ):
            export(base, "onnx", onnx(adapters={"qad": adapter}), tmp_path / "engine")
    with pytest.raises(EdgemedError, match="no float weights are its base"):
        merge.inputs(merge.Params(adapter, trained_on="float"))
    with pytest.raises(
        EdgemedError, match="carry no adapters, and this checkpoint is used with one"
    ):
        export(
            open_checkpoint(case / "out"),
            "tensorrt",
            plugins.load("targets", "tensorrt").Params(),
            tmp_path / "engine",
        )
    with pytest.raises(EdgemedError, match="brings an adapter 'qad' of its own"):
        export(
            open_checkpoint(case / "out"),
            "onnx",
            onnx(adapters={"qad": adapter}),
            tmp_path / "engine",
        )
    with pytest.raises(EdgemedError, match="cannot be the name of an adapter"):
        onnx_inputs = plugins.load("targets", "onnx").inputs
        onnx_inputs(onnx(adapters={"base": adapter}))
    lost = shutil.copytree(case / "out", tmp_path / "lost")
    shutil.rmtree(lost / "adapters")
    with pytest.raises(EdgemedError, match="says that the checkpoint is used with it"):
        export(open_checkpoint(lost), "onnx", onnx(), tmp_path / "engine")


def test_on_its_own_base_it_can_be_switched(case: Path, tmp_path: Path) -> None:
    """Given by hand to the quantized checkpoint, it is one adapter among others, and the base what
    is used where none is named.
    """
    pytest.importorskip("onnxruntime")
    adapter = str(case / "out" / "adapters" / "qad")
    module = plugins.load("targets", "onnx")
    engine = export(
        open_checkpoint(case / "packed"),
        "onnx",
        module.Params(precision="fp32", adapters={"mine": adapter}),
        tmp_path / "engine",
    )
    default = export(
        open_checkpoint(case / "out"), "onnx", module.Params(precision="fp32"), tmp_path / "default"
    )
    assert list(engine.adapters) == ["mine"]
    assert engine.default == ""
    assert engine.key != default.key
    assert default.bytes_per_token > engine.bytes_per_token
    one = engine.open(1, "mine")
    two = default.open(1)
    assert np.array_equal(one.prefill(IDS, every=True), two.prefill(IDS, every=True))
    one.close()
    two.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return section_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_divergence_falls_and_nothing_but_the_adapter_is_trained(
    model: Path, text: str, dtype: str, tmp_path: Path
) -> None:
    packed = run_step(
        Stage("quantize", quantize.Params("rtn", 2, 32)),
        open_checkpoint(model),
        tmp_path,
        tmp_path / "packed",
    )
    out = run_step(
        Stage("distill", beside(text, teacher=str(model), steps=24, dtype=dtype)),
        packed,
        tmp_path,
        tmp_path / "out",
    )
    notes = store.read_manifest(out.path)["notes"]
    assert notes["after"]["kl"] < 0.9 * notes["before"]["kl"]
    assert notes["written"]["max_abs_error"] < 1e-4 * notes["written"]["largest_score"]
    factors = 2 * 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))
    assert notes["trained"] == {
        "adapter": "adapters/qad",
        "parameters": factors,
        "bytes": factors * {"float32": 4, "float16": 2}[dtype],
    }
    right = torch.log_softmax(
        logits(CanonicalWeights(open_checkpoint(model)), torch.tensor([IDS])), -1
    )
    without, with_it = (
        float((right.exp() * (right - torch.log_softmax(logits(w, torch.tensor([IDS])), -1))).sum())
        for w in (CanonicalWeights(out), answering(out))
    )
    assert without != with_it
    with pytest.raises(EdgemedError, match="has been trained with a LoRA beside it"):
        run_step(
            Stage("distill", beside(text, teacher=str(model))), out, tmp_path, tmp_path / "again"
        )


def test_a_recipe_trains_it_and_its_engines_use_it(model: Path, text: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    recipe = tmp_path / "recipe.yaml"
    trained = (
        "calibration: text.jsonl, steps: 4, rate: 0.01, length: 48, batch: 4, evaluate_every: 4"
    )
    (tmp_path / "text.jsonl").write_text(Path(text).read_text())
    recipe.write_text(
        f"model: {model}\nsteps:\n  - distill: {{layers: 1, {trained}}}\n  - quantize: {{method:"
        f" rtn, bits: 4, group: 32}}\n  - distill: {{train: scales, {trained}}}\n  - distill:"
        f" {{train: lora, lora: 4, {trained}}}\nengines:\n  - onnx: {{name: with}}\n  - onnx:"
        " {name: without, from: quantize}\nverify: {prompts: pubmedqa-abstracts, count: 2,"
        " width: 48, prompt: 16, new: 8, max_kl: 5, min_top1: 0}\n"
    )
    done = cli("run", recipe, "--work", tmp_path / "work", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    made, plain = report["engines"]
    assert made["verify"]["passed"]
    assert made["verify"]["adapter"] == "qad"
    assert "adapter" not in plain["verify"]
    assert "adapters" not in made["verify"]
    # The teacher was found behind two quantized checkpoints: it is the float student of the first
    # step.
    float_files = next(step for step in report["steps"] if step["stage"] == "distill")["files"]
    assert report["steps"][-1]["notes"]["teacher"] == hashing.digest(
        {name: entry["sha256"] for name, entry in float_files.items()}
    )
    engine = tmp_path / "work" / "engines" / "with"
    own = json.loads(
        cli("verify", engine, "--adapter", "base", "--max-kl", 5, "--min-top1", 0, "--json").stdout
    )
    assert own["adapter"] == "base"
    assert own["reference"] == made["verify"]["reference"]
    assert own["mean_kl"] != made["verify"]["mean_kl"]
    float_student = next(
        p.parent
        for p in sorted((tmp_path / "work" / "store").glob("distill-*/config.json"))
        if "quantization_config" not in p.read_text()
    )
    done = cli(
        "eval",
        engine,
        "--task",
        "section",
        "--limit",
        "4",
        "--source",
        float_student,
        "--margin",
        "0.9",
        "--accept-undecided",
        "--json",
    )
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_with_an_adapter_answers_with_it_as_a_source(
    case: Path, tmp_path: Path
) -> None:
    """Exported without a float source, an engine is held against the integers with the adapter,
    which it then equals.
    """
    pytest.importorskip("onnxruntime")
    done = cli("export", case / "out", "--set", "precision=fp32", "--out", tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    assert "probably trained on a quantized base" not in done.stderr
    result = json.loads(cli("verify", tmp_path / "engine", "--json").stdout)
    assert result["passed"]
    assert result["max_logit_error"] < 1e-3
    done = cli(
        "export",
        case / "packed",
        "--source",
        case / "model",
        "--adapter",
        f"mine={case / 'out' / 'adapters' / 'qad'}",
        "--set",
        "precision=fp32",
        "--out",
        tmp_path / "switched",
    )
    assert done.returncode == 0, done.stderr
    references = [
        np.load(tmp_path / "switched" / folder / "reference.npz")["logits"]
        for folder in (".", "adapters/mine")
    ]
    assert np.array_equal(*references), (
        "what makes good what rounding did has the float source itself for its source"
    )


@pytest.mark.kill
def test_a_killed_run_ends_with_the_same_adapter(model: Path, text: str, tmp_path: Path) -> None:
    packed = run_step(
        Stage("quantize", quantize.Params("rtn", 3, 32)),
        open_checkpoint(model),
        tmp_path,
        tmp_path / "packed",
    )
    asked = [packed.path, "--teacher", model, "--calibration", text, "--steps", 40, "--rate", 1e-2]
    asked += [
        part
        for value in ("length=48", "batch=4", "evaluate_every=4", "train=lora", "lora=4")
        for part in ("--set", value)
    ]
    outs = distilled_whole_and_killed(asked, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole, killed = ((out / "adapters" / "qad" / name).read_bytes() for out in outs)
        assert whole == killed


def test_what_a_lora_beside_integers_refuses(model: Path, text: str, tmp_path: Path) -> None:
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
        "train=lora",
        "--set",
    ]
    refused(
        cli("distill", model, "--teacher", model, *quick, "lora=4"),
        "train: lora is for quantized students",
        "holds floats",
    )
    with pytest.raises(EdgemedError, match="needs the rank of the LoRA"):
        distill.inputs(beside(text, lora=0))
    with pytest.raises(EdgemedError, match="takes the whole quantized student"):
        distill.inputs(beside(text, layers=(0,)))
    with pytest.raises(EdgemedError, match="a merged lora are for floats"):
        distill.inputs(beside(text, train="scales"))
