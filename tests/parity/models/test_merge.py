"""Merging adapters: the merged checkpoint must give the adapter model's scores for every kind of
adapter, or be refused.

The adapter's scores come from peft itself, the merged ones from edgemed's own decoder on what was
written, so both the merge and the writing are checked.
"""

import json
import shutil

import pytest
import torch

from edgemed import params as strict
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.random_weights import make_random
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.steps import merge

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = ["c_attn", "c_proj", "c_fc"]
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 101,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
LORA = {"r": 4, "target_modules": TARGETS, "fan_in_fan_out": True}
KINDS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "pissa": lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "lora-with-biases": lambda: peft.LoraConfig(**LORA, bias="all"),
    "lora-and-a-saved-norm": lambda: peft.LoraConfig(**LORA, modules_to_save=["ln_f"]),
    "lora-and-saved-embedding": lambda: peft.LoraConfig(**LORA, modules_to_save=["wte"]),
    "lora-on-tied-embedding": lambda: peft.LoraConfig(r=4, target_modules=["wte"]),
    "lora-on-tied-output": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        target_modules=TARGETS, fan_in_fan_out=True, total_step=10
    ),
    "vera": lambda: peft.VeraConfig(target_modules=["c_attn"], fan_in_fan_out=True),
    "norms": lambda: peft.LNTuningConfig(target_modules=["ln_1", "ln_2"]),
}
TOKENS = torch.tensor([[5, 17, 3, 99, 42, 8, 61, 2], [90, 1, 33, 54, 7, 7, 12, 100]])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_random(CONFIG, tmp_path_factory.mktemp("base") / "base", "float32")


def adapter(base, config, path, task="CAUSAL_LM", auto="AutoModelForCausalLM", **options):
    """A saved adapter with weights far from zero, and its scores."""
    model = getattr(transformers, auto).from_pretrained(base.path, dtype=torch.float32, **options)
    model.config.pad_token_id = None
    config.task_type = task
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        scores = torch.cat([model(input_ids=row).logits for row in TOKENS.split(1)])
    model.save_pretrained(path)
    return str(path), scores


def merged(base, out, adapter_path, **params):
    out.mkdir()
    notes = merge.run(
        base, out, strict.build(merge.Params, {"adapter": adapter_path, **params}, "merge")
    )
    return open_checkpoint(out), notes


def base_scores(base):
    return logits(CanonicalWeights(base), TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_scores_are_the_adapters(base, tmp_path, kind):
    path, expected = adapter(base, KINDS[kind](), tmp_path / "adapter")
    checkpoint, notes = merged(base, tmp_path / "out", path)
    assert (base_scores(base) - expected).abs().max() > 0.01, (
        "the adapter changes nothing, so nothing would be tested"
    )
    assert (logits(CanonicalWeights(checkpoint), TOKENS) - expected).abs().max() < 1e-4
    assert notes["check_merge"]["max_abs_error"] <= notes["check_merge"]["bound"]
    assert all(entry.dtype == "float32" for entry in checkpoint.tensors.values())


def test_the_written_checkpoint_loads_in_transformers(base, tmp_path):
    path, expected = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    checkpoint, _ = merged(base, tmp_path / "out", path)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "lm_head.weight" not in checkpoint.tensors
    with torch.no_grad():
        assert (model(input_ids=TOKENS).logits - expected).abs().max() < 1e-4


def test_alpha_zero_is_the_base(base, tmp_path):
    path, _ = adapter(base, KINDS["dora"](), tmp_path / "adapter")
    checkpoint, _ = merged(base, tmp_path / "out", path, alpha=0.0)
    for name in base.tensors:
        assert torch.equal(checkpoint.read(name), base.read(name)), name


def test_alpha_half_is_half_the_lora(base, tmp_path):
    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    half = shutil.copytree(path, tmp_path / "half")
    (half / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2})
    )
    interpolated, _ = merged(base, tmp_path / "a", path, alpha=0.5)
    scaled, _ = merged(base, tmp_path / "b", str(half))
    for name in scaled.tensors:
        assert torch.allclose(interpolated.read(name), scaled.read(name), atol=1e-6), name


def test_float16_is_written_and_its_error_reported(base, tmp_path):
    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    checkpoint, notes = merged(base, tmp_path / "out", path, dtype="float16")
    assert all(entry.dtype == "float16" for entry in checkpoint.tensors.values())
    assert 1e-6 < notes["check_written"]["max_abs_error"] < 0.1


def test_an_adapter_brings_its_classification_head(base, tmp_path):
    config = peft.LoraConfig(**LORA, modules_to_save=["score"])
    path, expected = adapter(
        base,
        config,
        tmp_path / "adapter",
        "SEQ_CLS",
        "AutoModelForSequenceClassification",
        num_labels=3,
    )
    checkpoint, _ = merged(base, tmp_path / "out", path)
    weights = CanonicalWeights(checkpoint)
    assert (weights.decoder.head, weights.decoder.head_size) == ("classes", 3)
    assert (logits(weights, TOKENS)[:, -1] - expected).abs().max() < 1e-4


def test_a_choice_head_stored_under_biomedlms_name(base, tmp_path):
    from edgemed.models.checkpoint import Writer

    folder = tmp_path / "choice"
    folder.mkdir()
    writer = Writer(folder, base.config)
    for name in base.tensors:
        writer.add(name, base.read(name))
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    writer.add("classifier.weight", head)
    writer.close()
    source = open_checkpoint(folder)
    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    checkpoint, notes = merged(source, tmp_path / "out", path)
    weights = CanonicalWeights(checkpoint)
    assert weights.decoder.head == "choice"
    assert torch.equal(weights.matrix("head").weight, head)
    assert notes["check_written"]["max_abs_error"] < 1e-4


def refused(base, tmp_path, path, match, **params):
    with pytest.raises(EdgemedError, match=match):
        merged(base, tmp_path / "out", str(path), **params)


def test_a_missing_adapter(base, tmp_path):
    refused(base, tmp_path, tmp_path / "nowhere", "does not exist")
    with pytest.raises(EdgemedError, match="does not exist"):
        merge.inputs(merge.Params(str(tmp_path / "nowhere")))


def test_damaged_adapter_files(base, tmp_path):
    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    assert set(merge.inputs(merge.Params(path))) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    config = tmp_path / "adapter" / "adapter_config.json"
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    text = config.read_text()
    whole = weights.read_bytes()
    config.write_text(text[:40])
    refused(base, tmp_path, path, "adapter_config.json is damaged")
    shutil.rmtree(tmp_path / "out")
    config.write_text(json.dumps(json.loads(text) | {"peft_type": "LORAA"}))
    refused(base, tmp_path, path, "Did you mean 'LORA'")
    shutil.rmtree(tmp_path / "out")
    config.write_text(text)
    weights.write_bytes(whole[:-10])
    refused(base, tmp_path, path, "adapter_model.safetensors is damaged")
    shutil.rmtree(tmp_path / "out")
    weights.unlink()
    refused(base, tmp_path, path, "has no adapter_model.safetensors")


def test_an_adapter_for_another_base(base, tmp_path):
    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    wide = make_random(CONFIG | {"n_embd": 32}, tmp_path / "wide", "float32")
    refused(
        wide,
        tmp_path,
        path,
        r"'base_model.model.transformer.h.0.attn.c_attn.lora_A.weight' is \[4, 64\], the base needs"
        r" \[4, 32\]",
    )
    shutil.rmtree(tmp_path / "out")
    shallow = make_random(CONFIG | {"n_layer": 1}, tmp_path / "shallow", "float32")
    refused(shallow, tmp_path, path, "no place for 'base_model.model.transformer.h.1")
    shutil.rmtree(tmp_path / "out")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj"]}))
    refused(base, tmp_path, path, "q_proj")


def test_adapter_weights_with_nan(base, tmp_path):
    from safetensors.torch import load_file, save_file

    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    refused(base, tmp_path, path, f"{name}' holds NaN")


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_adapters_of_the_input_cannot_be_merged(base, tmp_path, kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path, tmp_path / "adapter", "adds virtual tokens")


def test_an_unfaithful_merge_is_refused(base, tmp_path, monkeypatch):
    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    monkeypatch.setattr(
        peft.tuners.lora.Linear,
        "get_delta_weight",
        lambda self, name: torch.zeros_like(self.get_base_layer().weight),
    )
    refused(base, tmp_path, path, "does not give the adapter model's scores")


def test_a_quantized_base_and_a_wrong_alpha_are_refused(base, tmp_path):
    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    refused(base, tmp_path, path, r"alpha: 1.5 is out of range. Give a number 0 to 1", alpha=1.5)
    shutil.rmtree(tmp_path / "out")
    quantized = shutil.copytree(base.path, tmp_path / "quantized")
    (quantized / "config.json").write_text(
        json.dumps(
            {
                **base.config,
                "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32},
            }
        )
    )
    refused(open_checkpoint(quantized), tmp_path, path, "is quantized")


def test_no_socket_opens(base, tmp_path, monkeypatch):
    import socket

    path, _ = adapter(base, KINDS["lora"](), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "someone/some-model"})
    )

    def denied(*args, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", denied)
    monkeypatch.setattr(socket, "getaddrinfo", denied)
    merged(base, tmp_path / "out", path)
