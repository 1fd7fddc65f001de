"""Adapters trained on a rounded base: what merge says they lose must be what transformers and peft
give for the model as it was trained.

The oracle is transformers' own nf4 or int8 model, expanded by bitsandbytes, with peft's adapter on
it.
"""

import json
import shutil

import pytest
import torch
from conftest import cli, refused, write_model

from edgemed.artifacts import store
from edgemed.data.text_sets import calibration_sequences
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.qlora import Trained
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.steps import merge

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "nf4": NF4,
    "nf4-double": {**NF4, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama in bfloat16, an adapter saved by peft on its nf4 base, and calibration text."""
    folder = tmp_path_factory.mktemp("qlora")
    model = write_model(folder / "model", "bfloat16", family="llama")
    (folder / "text.jsonl").write_text(
        "".join(
            json.dumps({"id": i, "text": " ".join(str(i * k) for k in range(40))}) + "\n"
            for i in range(30)
        )
    )
    trained = peft.get_peft_model(
        rounded(model, NF4),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(trained.named_parameters()):
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(folder / "adapter")
    return folder


def rounded(model, options):
    """transformers' rounded model, expanded. Loaded in float32, or it would be expanded into
    bfloat16, which rounds as much as int8 does.
    """
    config = transformers.BitsAndBytesConfig(**options)
    found = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map="cpu", quantization_config=config
    )
    return found.dequantize().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_difference_is_that_from_the_trained_model(folder, tmp_path, kind):
    out = tmp_path / "merged"
    out.mkdir()
    base = open_checkpoint(folder / "model")
    notes = merge.run(
        base,
        out,
        merge.Params(
            str(folder / "adapter"),
            trained_on=kind,
            calibration=str(folder / "text.jsonl"),
            samples=6,
            length=64,
        ),
    )
    windows = torch.tensor(
        calibration_sequences(str(folder / "text.jsonl"), open_tokenizer(base.path, 288), 6, 64)
    )
    trained = peft.PeftModel.from_pretrained(
        rounded(folder / "model", KINDS[kind]), folder / "adapter"
    ).eval()
    with torch.no_grad():
        right = torch.cat([trained(input_ids=row).logits for row in windows.split(1)])
    found = logits(Trained(open_checkpoint(out), CanonicalWeights(base), kind), windows)
    ours = logits(CanonicalWeights(open_checkpoint(out)), windows)
    said = notes["trained_on"]
    assert (found - right).abs().max() < 1e-5 * right.abs().max() < (ours - right).abs().max()
    p = right.double().log_softmax(-1)
    q = ours.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert said["base"] == kind
    assert said["positions"] == kl.numel() == 6 * 64
    assert said["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-2)
    assert said["mean_kl"] > 1e-5
    assert said["relative_logit_difference"] == pytest.approx(
        float((ours - right).norm() / right.norm()), rel=1e-3
    )
    assert 0.5 < said["top1"] <= 1


def test_the_command_says_it_and_the_manifest_keeps_it(folder, tmp_path):
    sets = [
        part for pair in ("trained_on=nf4", "samples=4", "length=48") for part in ("--set", pair)
    ]
    done = cli(
        "merge",
        folder / "model",
        "--adapter",
        folder / "adapter",
        "--calibration",
        folder / "text.jsonl",
        *sets,
        "--out",
        tmp_path / "merged",
    )
    assert done.returncode == 0, done.stderr
    assert "differs from what was trained by a mean KL of" in " ".join(done.stderr.split())
    manifest = store.read_manifest(tmp_path / "merged")
    assert manifest["notes"]["trained_on"]["positions"] == 192
    assert "calibration" in manifest["inputs"]


def named(folder, out, **changes):
    shutil.copytree(folder / "adapter", out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | changes))
    return out


def test_what_looks_like_qlora_is_refused_until_told(folder, tmp_path):
    quantized = shutil.copytree(folder / "model", tmp_path / "base")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps(
            config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        )
    )
    for number, (base, said) in enumerate(
        (
            (str(quantized), "is quantized (bitsandbytes)"),
            ("unsloth/llama-3-8b-bnb-4bit", "is called"),
        )
    ):
        adapter = named(folder, tmp_path / f"adapter-{number}", base_model_name_or_path=base)
        refused(
            cli("merge", folder / "model", "--adapter", adapter, "--out", tmp_path / "out"),
            "probably trained on a quantized base",
            said,
            "trained_on=nf4",
        )
    (tmp_path / "told").mkdir()
    notes = merge.run(
        open_checkpoint(folder / "model"),
        tmp_path / "told",
        merge.Params(str(adapter), trained_on="float"),
    )
    assert "trained_on" not in notes
    assert notes["check_merge"]["max_abs_error"] < 1e-3
    plain = named(folder, tmp_path / "plain", base_model_name_or_path="medical/llama-3-8b-instruct")
    assert merge.inputs(merge.Params(str(plain)))


def test_requests_that_cannot_be_measured_are_refused(folder, tmp_path):
    def reason(match, adapter=folder / "adapter", **params):
        with pytest.raises(EdgemedError, match=match):
            merge.run(
                open_checkpoint(folder / "model"),
                tmp_path / "out",
                merge.Params(str(adapter), **params),
            )

    text = str(folder / "text.jsonl")
    reason("trained on nf4 loses is measured on text.*Give calibration", trained_on="nf4")
    reason("calibration and weights are for experts", calibration=text)
    reason("calibration and weights are for experts", trained_on="float", calibration=text)
    reason(
        "known for LoRA only, not for DoRA",
        named(folder, tmp_path / "dora", use_dora=True),
        trained_on="nf4",
        calibration=text,
    )
    with pytest.raises(EdgemedError, match="trained_on is an adapter's"):
        merge.inputs(merge.Params(experts="dense", trained_on="nf4"))


def test_an_engine_that_carries_such_an_adapter_says_so(folder, tmp_path):
    adapter = named(folder, tmp_path / "adapter", base_model_name_or_path="some/model-nf4")
    done = cli(
        "export",
        folder / "model",
        "--prompts",
        "none",
        "--adapter",
        f"a={adapter}",
        "--set",
        "precision=fp32",
        "--out",
        tmp_path / "engine",
    )
    assert done.returncode == 0, done.stderr
    assert "adapter 'a' was probably trained on a quantized base" in " ".join(done.stderr.split())
