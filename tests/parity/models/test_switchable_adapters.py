"""Engines that carry LoRA adapters unmerged: each must answer as peft and as the merged engine do,
the base as if there were none, and the wrong adapter be refused.

The oracle is peft's own model; the merged engine, made by the merge step from the same adapter,
must besides say the same tokens.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, cli, refused, tokens, write_model

from edgemed import plugins
from edgemed.artifacts import store
from edgemed.engines.engine import export, open_engine
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.lora import FOLDED, Adapted, read_lora
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import merge, quantize

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
onnx, llamacpp, tensorrt = (
    plugins.load("targets", name) for name in ("onnx", "llamacpp", "tensorrt")
)
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "up_proj"],
}
IDS = tokens(60)
FLOAT32_PARAMS = {"onnx": {"precision": "fp32"}, "llamacpp": {"type": "f32"}}
QUICKSTART = ROOT / "recipes" / "quickstart"


def save(model, out, config, seed=0):
    """A PEFT adapter with factors far from zero; returns peft's scores float32 [60, vocab]."""
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        scores = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(out, save_embedding_layers=False)
    return scores


def gpt2_lora():
    return peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS["gpt2"],
        fan_in_fan_out=True,
    )


@pytest.fixture(scope="module", params=TARGETS)
def case(request, tmp_path_factory):
    """(model, {adapter: directory}, {adapter: peft's scores}) of one family: two adapters of
    different rank, scale and targets.
    """
    folder = tmp_path_factory.mktemp(request.param)
    family = request.param
    # For BioMedLM's architecture a later layer's q is folded into the weights of some runtimes, and
    # the factors must be, too.
    model = write_model(folder / "model", family=family)
    plain = {"target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    configs = {
        "first": peft.LoraConfig(r=4, lora_alpha=12, **plain),
        "second": peft.LoraConfig(
            r=8,
            lora_alpha=6,
            use_rslora=True,
            **(plain | {"target_modules": TARGETS[family][:2]}),
            alpha_pattern={TARGETS[family][0]: 20},
            rank_pattern={TARGETS[family][1]: 2},
        ),
    }
    scores = {
        name: save(model, folder / name, config, seed)
        for seed, (name, config) in enumerate(configs.items())
    }
    return model, {name: str(folder / name) for name in configs}, scores


@pytest.mark.parametrize("target", FLOAT32_PARAMS)
def test_each_adapter_is_pefts_and_the_base_is_untouched(case, target, tmp_path):
    model, adapters, scores = case
    module = plugins.load("targets", target)
    checkpoint = open_checkpoint(model)
    plain = export(
        checkpoint, target, module.Params(**FLOAT32_PARAMS[target]), tmp_path / "plain"
    ).open(1)
    engine = export(
        checkpoint,
        target,
        module.Params(**FLOAT32_PARAMS[target], adapters=adapters),
        tmp_path / "engine",
    )
    assert tuple(engine.adapters) == ("first", "second")
    assert open_engine(tmp_path / "engine", check=True) == engine
    session = engine.open(1)
    base = plain.prefill(IDS, every=True).copy()
    assert np.array_equal(session.prefill(IDS, every=True), base), (
        "no adapter must be exactly the engine without any"
    )
    # llama.cpp's GELU comes from a float16 table.
    bound = 5e-3 if (target, model.parent.name[:4]) == ("llamacpp", "gpt2") else 1e-5
    for name, right in scores.items():
        session.use(name)
        assert session.position == 0
        found = session.prefill(IDS, every=True)
        assert np.abs(right - base).max() > 0.5, (
            "the adapter changes little, so little would be tested"
        )
        assert np.abs(found - right).max() < bound * np.abs(right).max()
        merged_folder = tmp_path / f"merged-{name}"
        merged_folder.mkdir()
        merge.run(checkpoint, merged_folder, merge.Params(adapters[name]))
        merged = export(
            open_checkpoint(merged_folder),
            target,
            module.Params(**FLOAT32_PARAMS[target]),
            tmp_path / f"engine-{name}",
        ).open(1)
        assert np.abs(merged.prefill(IDS, every=True) - found).max() < bound * np.abs(right).max()
        session.rewind(0)
        merged.rewind(0)
        assert list(generate(session, IDS[:20], Sampling(max_tokens=40))) == list(
            generate(merged, IDS[:20], Sampling(max_tokens=40))
        )
        merged.close()
    session.use(None)
    assert np.array_equal(session.prefill(IDS, every=True), base)
    for opened in (session, plain):
        opened.close()


@pytest.mark.parametrize("target", FLOAT32_PARAMS)
def test_a_switch_forgets_the_cache_and_staying_keeps_it(case, target, tmp_path):
    model, adapters, scores = case
    engine = export(
        open_checkpoint(model),
        target,
        plugins.load("targets", target).Params(**FLOAT32_PARAMS[target], adapters=adapters),
        tmp_path / "engine",
    )
    session = engine.open(1, "first")
    right = scores["first"]
    session.prefill(IDS[:30])
    session.use("first")
    assert session.position == 30
    assert np.abs(session.prefill(IDS[30:], every=True) - right[30:]).max() < 5e-3
    session.use("second")
    assert session.position == 0
    session.prefill(IDS[:30])
    session.use(None)
    session.use("first")
    assert session.position == 0
    assert np.abs(session.prefill(IDS, every=True) - right).max() < 5e-3
    session.close()


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("onnx", {"precision": "int4", "group": 32, "accuracy_level": 1}),
        ("onnx", {"precision": "fp16"}),
        ("llamacpp", {"type": "q8_0"}),
    ],
)
def test_a_rounded_base_with_an_adapter(case, target, params, tmp_path):
    """Against what the rounded base, read back as floats, gives with the adapter; the base itself
    must be the plain engine's to the last digit.
    """
    model, adapters, scores = case
    module = plugins.load("targets", target)
    checkpoint = open_checkpoint(model)
    plain = export(checkpoint, target, module.Params(**params), tmp_path / "plain").open(1)
    session = export(
        checkpoint, target, module.Params(**params, adapters=adapters), tmp_path / "engine"
    ).open(1)
    base = plain.prefill(IDS, every=True).copy()
    assert np.array_equal(session.prefill(IDS, every=True), base)
    session.use("first")
    found = session.prefill(IDS, every=True)
    if params.get("precision") == "int4":
        right = logits(Rounded(checkpoint, "first", adapters["first"]), torch.tensor([IDS]))[
            0
        ].numpy()
        assert np.abs(found - right).max() < 1e-3 * np.abs(right).max()
    else:
        assert np.abs(found - scores["first"]).max() < 0.2 * np.abs(base - scores["first"]).max()


class Rounded(Adapted):
    """The adapted source with its layers' matrices, tables and output matrix rounded as an int4
    engine holds them.
    """

    def matrix(self, name):
        from conftest import on_q8_grid

        from edgemed.models.weights import Dense
        from edgemed.quantization.grids import rtn

        exact = CanonicalWeights.matrix(self, name)
        if name == "lm_head":
            return Dense(on_q8_grid(exact.dense()), exact.bias)
        q, scales = rtn(exact.dense(), 4, 32)
        weight = (q.float() - 8) * scales.repeat_interleave(32, 1)
        a, b = self.factors.get(
            name, (torch.zeros(0, weight.shape[1]), torch.zeros(weight.shape[0], 0))
        )
        return Dense(weight + b @ a, exact.bias)

    def table(self, name):
        return super().table(name).half().float()


def test_factors_follow_what_a_quantize_step_folds(tmp_path):
    """GPT-2 with scores divided by the layer's number: gptq and rtn checkpoints have that in their
    q rows, and so must an adapter's.
    """
    model = write_model(tmp_path / "model", scale_attn_by_inverse_layer_idx=True)
    save(model, tmp_path / "adapter", gpt2_lora())
    (tmp_path / "packed").mkdir()
    quantize.run(open_checkpoint(model), tmp_path / "packed", quantize.Params("rtn", 8, 32))
    packed = open_checkpoint(tmp_path / "packed")
    source = Adapted(open_checkpoint(model), "a", str(tmp_path / "adapter"))
    right = logits(source, torch.tensor([IDS]))[0]
    found = logits(Adapted(packed, "a", str(tmp_path / "adapter")), torch.tensor([IDS]))[0]
    base = (
        logits(CanonicalWeights(packed), torch.tensor([IDS]))[0]
        - logits(CanonicalWeights(open_checkpoint(model)), torch.tensor([IDS]))[0]
    )
    assert (found - right).abs().max() < 3 * base.abs().max(), (
        "with the factor forgotten it is many times the rounding"
    )
    plain = source.factors["layers.1.qkv"]
    folded = read_lora(CanonicalWeights(packed), "a", str(tmp_path / "adapter")).factors[
        "layers.1.qkv"
    ]
    assert torch.allclose(plain[1][:64] / 2, folded[1][:64])
    assert torch.equal(plain[1][64:], folded[1][64:])


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_a_base_whose_inputs_were_rescaled_is_refused(tmp_path, method):
    model = write_model(tmp_path / "model")
    save(model, tmp_path / "adapter", gpt2_lora())
    (tmp_path / "packed").mkdir()
    shape = {"bits": 8, "group": -1} if method == "smoothquant" else {"group": 32}
    quantize.run(
        open_checkpoint(model),
        tmp_path / "packed",
        quantize.Params(
            method,
            **shape,
            calibration="medquad-answers",
            samples=4,
            length=32,
        ),
    )
    with pytest.raises(
        EdgemedError, match="inputs were rescaled when it was quantized.*gptq or rtn"
    ):
        read_lora(
            CanonicalWeights(open_checkpoint(tmp_path / "packed")), "a", str(tmp_path / "adapter")
        )


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_base_that_an_older_step_quantized_is_refused(tmp_path, method):
    """Its config.json does not say what was folded; its manifest does."""
    model = write_model(tmp_path / "model", scale_attn_by_inverse_layer_idx=method == "rtn")
    save(model, tmp_path / "adapter", gpt2_lora())
    params = quantize.Params(
        method,
        8,
        32,
        **(
            {}
            if method == "rtn"
            else {"calibration": "medquad-answers", "samples": 4, "length": 32}
        ),
    )
    packed = run_step(
        Stage("quantize", params), open_checkpoint(model), tmp_path, tmp_path / "packed"
    ).path
    config = json.loads((packed / "config.json").read_text())
    assert config.pop(FOLDED)
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdgemedError, match="before edgemed wrote down what it folds"):
        read_lora(CanonicalWeights(open_checkpoint(packed)), "a", str(tmp_path / "adapter"))


def test_the_quickstarts_adapter_says_what_the_merged_engine_says(tmp_path):
    checkpoint = open_checkpoint(QUICKSTART / "model")
    adapter = str(QUICKSTART / "adapter")
    (tmp_path / "merged").mkdir()
    merge.run(checkpoint, tmp_path / "merged", merge.Params(adapter))
    from edgemed.data.text_sets import texts
    from edgemed.models.tokenizer import encode

    for target, params in FLOAT32_PARAMS.items():
        module = plugins.load("targets", target)
        session = export(
            checkpoint,
            target,
            module.Params(**params, adapters={"sections": adapter}),
            tmp_path / f"{target}-adapter",
        ).open(1, "sections")
        merged = export(
            open_checkpoint(tmp_path / "merged"), target, module.Params(**params), tmp_path / target
        )
        tokenizer = merged.tokenizer()
        other = merged.open(1)
        for text in list(texts("pubmedqa-abstracts", "heldout"))[:4]:
            prompt = encode(tokenizer, text)[:64]
            answers = []
            for one in (session, other):
                one.rewind(0)
                answers.append(list(generate(one, prompt, Sampling(max_tokens=32))))
            assert answers[0] == answers[1]
            assert len(answers[0]) == 32
        session.close()
        other.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny GPT-2, its adapter, and the ONNX engine with both, made by the command line with
    reference answers.
    """
    folder = tmp_path_factory.mktemp("cli")
    model = write_model(folder / "model")
    save(model, folder / "adapter", gpt2_lora())
    done = cli(
        "export",
        model,
        "--adapter",
        f"notes={folder / 'adapter'}",
        "--set",
        "precision=fp32",
        "--out",
        folder / "engine",
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_verbs_take_an_adapter(tiny):
    engine = tiny / "engine"
    manifest = store.read_manifest(engine)
    assert {name for name in manifest["inputs"] if name.startswith("adapter/")} == {
        "adapter/notes/adapter_config.json",
        "adapter/notes/adapter_model.safetensors",
    }
    assert {"adapters/notes/adapter.onnx_adapter", "adapters/notes/reference.npz"} <= set(
        manifest["files"]
    )
    both = json.loads(cli("verify", engine, "--json").stdout)
    assert both["passed"]
    assert both["adapters"]["notes"]["passed"]
    assert both["adapters"]["notes"]["greedy_same"] == both["greedy_tokens"]
    own = json.loads(cli("verify", engine, "--adapter", "notes", "--json").stdout)
    assert own["adapter"] == "notes"
    assert own["reference"] != both["reference"]
    assert own["max_logit_error"] < 1e-3
    text, adapted = (
        cli(
            "generate", engine, "--prompt", "The patient was", "--max-tokens", "20", *more, "--json"
        )
        for more in ((), ("--adapter", "notes"))
    )
    assert json.loads(text.stdout)["text"] != json.loads(adapted.stdout)["text"]
    refused(
        cli("generate", engine, "--prompt", "x", "--adapter", "note"),
        engine,
        "no adapter 'note'",
        "Did you mean 'notes'",
    )
    refused(
        cli("eval", engine, "--task", "pubmedqa", "--adapter", "notes", "--record"), "base only"
    )


def test_an_adapter_is_evaluated_against_the_source_with_it(tiny):
    engine = tiny / "engine"
    out = tiny / "found.json"
    done = cli(
        "eval",
        engine,
        "--task",
        "section",
        "--limit",
        "6",
        "--adapter",
        "notes",
        "--source",
        tiny / "model",
        "--margin",
        "0.5",
        "--accept-undecided",
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["engine"][0]["model"] == "engine+notes"
    assert found["engine"][0]["paired"]["changed"] == 0
    again = cli(
        "eval",
        engine,
        "--task",
        "section",
        "--limit",
        "6",
        "--adapter",
        "notes",
        "--against",
        out,
        "--margin",
        "0.5",
        "--accept-undecided",
    )
    assert again.returncode == 0, again.stderr
    refused(
        cli(
            "eval", engine, "--task", "section", "--limit", "6", "--against", out, "--margin", "0.5"
        ),
        "not that of a source of this engine",
    )


def test_the_key_is_that_of_the_adapter(tiny, tmp_path):
    params = onnx.Params(
        precision="fp32",
        adapters={"notes": str(shutil.copytree(tiny / "adapter", tmp_path / "adapter"))},
    )
    first = export(open_checkpoint(tiny / "model"), "onnx", params, tmp_path / "first")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    assert (
        export(open_checkpoint(tiny / "model"), "onnx", params, tmp_path / "second").key
        != first.key
    )
    (first.path / "adapters" / "notes" / "adapter.onnx_adapter").write_bytes(b"x" * 100)
    with pytest.raises(EdgemedError, match="was altered"):
        open_engine(first.path)


def test_a_recipe_verifies_its_adapters(tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    shutil.copytree(tiny / "adapter", tmp_path / "lora")
    recipe.write_text(
        f"model: {tiny / 'model'}\nengines:\n  - onnx: {{name: o, precision: fp32, adapters:"
        " {notes: lora}}\nverify: {prompts: pubmedqa-abstracts, count: 2, width: 48, prompt:"
        " 16, new: 8}\n"
    )
    done = cli("run", recipe, "--work", tmp_path / "work", "--json")
    assert done.returncode == 0, done.stderr
    (engine,) = json.loads(done.stdout)["engines"]
    assert engine["verify"]["passed"]
    assert engine["verify"]["adapters"]["notes"]["max_logit_error"] < 1e-3


BAD = {
    "dora": (
        peft.LoraConfig(
            r=4,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            use_dora=True,
        ),
        "use_dora true.*Merge it instead",
    ),
    "saved modules": (
        peft.LoraConfig(
            r=4,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            modules_to_save=["ln_f"],
        ),
        "modules_to_save.*Merge it instead",
    ),
    "biases": (
        peft.LoraConfig(
            r=4,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            bias="all",
        ),
        'bias "all".*Merge it instead',
    ),
    "pissa": (
        peft.LoraConfig(
            r=4,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            init_lora_weights="pissa",
        ),
        "pissa.*changes the base's own weights",
    ),
    "ia3": (
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        "a IA3 adapter.*Merge it instead",
    ),
    "embedding": (
        peft.LoraConfig(r=4, target_modules=["wte"]),
        "cannot be switched.*Merge it instead",
    ),
    "output": (
        peft.LoraConfig(r=4, target_modules=["lm_head"]),
        "only attention and dense MLP matrices.*Merge it instead",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("target", ["onnx", "llamacpp"])
def test_what_is_not_two_factors_is_refused(tiny, tmp_path, kind, target):
    config, match = BAD[kind]
    save(tiny / "model", tmp_path / "adapter", config)
    with pytest.raises(EdgemedError, match=match):
        export(
            open_checkpoint(tiny / "model"),
            target,
            plugins.load("targets", target).Params(adapters={"a": str(tmp_path / "adapter")}),
            tmp_path / "engine",
        )
    assert not (tmp_path / "engine").exists()


def test_adapters_that_do_not_fit_are_refused(tiny, tmp_path):
    wide = write_model(tmp_path / "wide", n_embd=96)
    llama = write_model(tmp_path / "llama", family="llama")
    checkpoint = open_checkpoint(tiny / "model")

    def reason(path, match, name="a"):
        with pytest.raises(EdgemedError, match=match):
            export(
                checkpoint,
                "onnx",
                onnx.Params(precision="fp32", adapters={name: str(path)}),
                tmp_path / "engine",
            )

    for model, family, match in (
        (wide, "gpt2", "does not belong to.*its matrix is \\[192, 64\\]"),
        (llama, "llama", "does not belong to.*there is no '.*q_proj'"),
    ):
        save(
            model,
            tmp_path / f"adapter-{family}",
            peft.LoraConfig(
                r=4, target_modules=TARGETS[family][:1], fan_in_fan_out=family == "gpt2"
            ),
        )
        reason(tmp_path / f"adapter-{family}", match)
    reason(tmp_path / "nowhere", "does not exist")
    reason(tiny / "adapter", "cannot be the name of an adapter", "../up")
    half = shutil.copytree(tiny / "adapter", tmp_path / "half")
    from safetensors.torch import load_file, save_file

    whole = load_file(half / "adapter_model.safetensors")
    save_file(
        {
            name: tensor
            for name, tensor in whole.items()
            if not name.endswith("h.0.attn.c_attn.lora_B.weight")
        },
        half / "adapter_model.safetensors",
    )
    reason(half, "without its other factor")
    save_file(
        {name: tensor * ("lora_A" in name) for name, tensor in whole.items()},
        half / "adapter_model.safetensors",
    )
    reason(half, "changes nothing")
    with pytest.raises(EdgemedError, match="TensorRT engines cannot switch adapters; merge"):
        export(
            checkpoint,
            "tensorrt",
            tensorrt.Params(adapters={"a": str(tiny / "adapter")}),
            tmp_path / "engine",
        )


def test_models_whose_gguf_is_rewritten_refuse_adapters(tmp_path):
    model = write_model(tmp_path / "model", family="moe-tinymed")
    with pytest.raises(EdgemedError, match="the mean is taken out.*merge the adapter first"):
        export(
            open_checkpoint(model),
            "llamacpp",
            llamacpp.Params(adapters={"a": str(tmp_path)}),
            tmp_path / "engine",
        )
