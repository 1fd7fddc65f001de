"""Whether the output matrix is the embedding: every state of files and flags, for each family,
against what transformers loads from the same directory.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import tiny_config, write_model, write_tokenizer
from safetensors.torch import load_file, save_file

from edgemed import plugins
from edgemed.api import export
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights

TOKENS = torch.tensor([[7, 3, 99, 12, 41, 8, 5, 77]])
FAMILIES = ("gpt2", "llama", "qwen2", "phi", "stablelm")
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 64,
}
VISION = {
    "qwen2_vl": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 3, 3],
                },
            },
            vision_config={
                "depth": 1,
                "embed_dim": 32,
                "num_heads": 2,
                "hidden_size": 64,
                "patch_size": 14,
            },
            image_token_id=259,
            video_token_id=260,
            vision_start_token_id=261,
            vision_end_token_id=262,
        )
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 32,
            },
            image_token_index=259,
        )
    ),
}


def with_random_weights(model: torch.nn.Module, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name or "ln_" in name:
                parameter.add_(1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> a checkpoint with an output matrix of its own."""
    folder = tmp_path_factory.mktemp("untied")
    models = {}
    for family in FAMILIES:
        config = tiny_config(family, vocab_size=264, tie_word_embeddings=False)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), dtype=torch.float32
        )
        models[family] = with_random_weights(model, folder / family)
    for family, make in VISION.items():
        models[family] = with_random_weights(make(), folder / family)
    return models


def state(source: Path, out: Path, head: str, flags: dict[str, object]) -> Path:
    """A copy with the output matrix 'other', 'same', 'alone' (no table), 'bf16' or 'none', and
    tie_word_embeddings set at the root and in text_config ('absent': left out).
    """
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    table = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    output = next(name for name in tensors if name.endswith("lm_head.weight"))
    if head == "none":
        del tensors[output]
    elif head == "alone":
        del tensors[table]
    elif head in ("same", "bf16"):
        tensors[table] = tensors[table].bfloat16().float()
        tensors[output] = tensors[table].clone()
        if head == "bf16":
            tensors[output] = tensors[output].bfloat16()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    file = out / "config.json"
    config = json.loads(file.read_text())
    for place, flag in flags.items():
        target = config if place == "root" else config[place]
        target.pop("tie_word_embeddings", None)
        if flag != "absent":
            target["tie_word_embeddings"] = flag
    file.write_text(json.dumps(config))
    return out


def transformers_logits(folder: Path, family: str) -> torch.Tensor:
    auto = "AutoModelForImageTextToText" if family in VISION else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def check(folder: Path, family: str) -> None:
    expected = transformers_logits(folder, family)
    scores = logits(CanonicalWeights(open_checkpoint(folder)), TOKENS)
    assert (scores - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("head", ["other", "same", "bf16", "alone", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_by_its_config(untied, tmp_path: Path, family: str, head: str) -> None:
    check(state(untied[family], tmp_path / "model", head, {"root": True}), family)


@pytest.mark.parametrize("family", [*FAMILIES, *VISION])
@pytest.mark.parametrize("flag", [False, "absent"])
def test_not_tied_by_its_config(untied, tmp_path: Path, family: str, flag: object) -> None:
    flags = {"root": flag} | ({"text_config": "absent"} if family in VISION else {})
    check(state(untied[family], tmp_path / "other", "other", flags), family)
    folder = state(untied[family], tmp_path / "none", "none", flags)
    if family == "gpt2" and flag == "absent":
        # GPT2Config is tied where it says nothing.
        check(folder, family)
        return
    with pytest.raises(EdgemedError, match=r"lm_head.*missing.*tie_word_embeddings") as caught:
        CanonicalWeights(open_checkpoint(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("head", ["other", "none"])
@pytest.mark.parametrize("root", [True, False, "absent"])
@pytest.mark.parametrize("text", [True, False, "absent"])
def test_either_place_of_a_vision_config_ties(
    untied, tmp_path: Path, family: str, head: str, root: object, text: object
) -> None:
    if head == "none" and True not in (root, text):
        pytest.skip("test_not_tied_by_its_config has it")
    flags = {"root": root, "text_config": text}
    check(state(untied[family], tmp_path / "model", head, flags), family)


@pytest.mark.parametrize("target", ["onnx", "llamacpp"])
def test_an_engine_has_the_stored_output_matrix(untied, tmp_path: Path, target: str) -> None:
    folder = state(untied["qwen2"], tmp_path / "model", "other", {"root": True})
    params = {"onnx": {"precision": "fp32"}, "llamacpp": {"type": "f32"}}[target]
    engine = export(str(folder), target, str(tmp_path / "engine"), prompts=None, **params)
    session = engine.open(1)
    scores = torch.from_numpy(session.prefill(TOKENS[0].tolist(), every=True).copy())
    session.close()
    expected = transformers_logits(folder, "qwen2")[0]
    assert (scores - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_step_after_it_writes_what_is_stored(untied, tmp_path: Path) -> None:
    folder = state(untied["llama"], tmp_path / "model", "other", {"root": True})
    step = plugins.load("steps", "quantize")
    (tmp_path / "out").mkdir()
    step.run(open_checkpoint(folder), tmp_path / "out", step.Params(method="rtn", group=32))
    quantized = open_checkpoint(tmp_path / "out")
    assert quantized.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in quantized.tensors


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_bias_that_config_json_does_not_know(tmp_path: Path, family: str) -> None:
    model = write_model(tmp_path / "model", family=family)
    tensors = load_file(model / "model.safetensors")
    key = next(name for name in tensors if name.endswith("0.self_attn.o_proj.weight"))
    bias = key.replace(".weight", ".bias")
    save_file({**tensors, bias: torch.ones(64)}, model / "model.safetensors")
    for stated in ({}, {"attention_bias": False}) if family == "llama" else ({},):
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
        with pytest.raises(
            EdgemedError, match=r"o_proj\.bias' is stored, and .* would leave it out"
        ):
            CanonicalWeights(open_checkpoint(model))
    # AutoGPTQ writes zeros for every module.
    save_file({**tensors, bias: torch.zeros(64)}, model / "model.safetensors")
    CanonicalWeights(open_checkpoint(model))


@pytest.mark.parametrize(
    ("family", "stated", "module", "reason"),
    [
        ("llama", {"mlp_bias": True}, "gate_proj", "config.json says mlp_bias: true"),
        ("llama", {"attention_bias": True}, "q_proj", "config.json says attention_bias: true"),
        ("stablelm", {"use_qkv_bias": True}, "q_proj", "config.json says use_qkv_bias: true"),
        ("qwen2", {}, "k_proj", "every qkv of qwen2 has one"),
        ("phi", {}, "dense", "every o of phi has one"),
        ("phi", {}, "fc2", "every down of phi has one"),
    ],
)
def test_a_bias_that_is_missing(
    tmp_path: Path, family: str, stated: dict[str, bool], module: str, reason: str
) -> None:
    model = write_model(tmp_path / "model", family=family)
    tensors = load_file(model / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith(f"{module}.bias")}
    save_file(kept, model / "model.safetensors")
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    with pytest.raises(EdgemedError, match=rf"{module}\.bias' is missing, and {reason}"):
        CanonicalWeights(open_checkpoint(model))


def test_an_output_matrix_without_its_bias(tmp_path: Path) -> None:
    """Llama applies attention_bias to it too."""
    model = write_model(tmp_path / "model", family="llama")
    tensors = load_file(model / "model.safetensors")
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_bias": True}))
    biases = {
        name.replace(".weight", ".bias"): torch.ones(len(value))
        for name, value in tensors.items()
        if ".self_attn." in name
    }
    save_file(tensors | biases, model / "model.safetensors")
    CanonicalWeights(open_checkpoint(model))
    kept = {name: value for name, value in biases.items() if "o_proj" not in name}
    save_file(tensors | kept, model / "model.safetensors")
    with pytest.raises(EdgemedError, match=r"o_proj\.bias' is missing, and .*attention_bias: true"):
        CanonicalWeights(open_checkpoint(model))
