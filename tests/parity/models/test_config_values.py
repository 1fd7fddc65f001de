"""Every value of config.json that is understood gives the scores that transformers gives.

Each case is a tiny model of transformers with random weights everywhere, saved by transformers and
read by edgemed. Rotary frequencies and the factor on cosines and sines are also compared by
themselves, at the sizes of published models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import edgemed as em
from edgemed import plugins
from edgemed.errors import EdgemedError
from edgemed.models.architecture import all_families
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights

IDS = [7, 3, 99, 250, 12, 41, 41, 8, 100, 31, 5, 77, 3, 3, 90, 61, 200, 17, 18, 19, 20, 21, 22, 23]
USUAL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 288,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# pairs of a head of 16
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}


def rope(values: dict[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, **values}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "head_dim": ("llama", {"head_dim": 32}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "kv heads left out": ("llama", {"num_key_value_heads": None}),
    "attention_bias": ("llama", {"attention_bias": True}),
    "mlp_bias": ("llama", {"mlp_bias": True}),
    "swish": ("llama", {"hidden_act": "swish"}),
    "eps": ("llama", {"rms_norm_eps": 0.01}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "theta": ("llama", rope({"rope_type": "default"}, 500.0)),
    "linear": ("llama", rope({"rope_type": "linear", "factor": 3.0})),
    "dynamic": ("llama", rope({"rope_type": "dynamic", "factor": 2.0})),
    "llama3": ("llama", rope(LLAMA3)),
    "yarn": ("llama", rope(YARN)),
    "yarn, not truncated": ("llama", rope({**YARN, "truncate": False})),
    "yarn, attention_factor": ("llama", rope({**YARN, "attention_factor": 1.3})),
    "yarn, mscale": ("llama", rope({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5})),
    "yarn, betas": ("llama", rope({**YARN, "beta_fast": 4.0, "beta_slow": 0.5})),
    "yarn, head_dim": ("llama", {**rope(YARN), "head_dim": 32}),
    "longrope": ("llama", rope(LONG)),
    "qwen2": ("qwen2", {}),
    "qwen2, head_dim": ("qwen2", {"head_dim": 32}),
    "qwen2, yarn": ("qwen2", rope(YARN, 1e6)),
    "qwen2, window as long as the context": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    ),
    "qwen2, window behind every layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "phi": ("phi", {}),
    "phi, share": ("phi", rope({"rope_type": "default", "partial_rotary_factor": 0.25})),
    "phi, linear": (
        "phi",
        rope({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
    ),
    "phi, gelu": ("phi", {"hidden_act": "gelu"}),
    "phi, gelu_fast": ("phi", {"hidden_act": "gelu_fast"}),
    "phi, head_dim": ("phi", {"head_dim": 32}),
    "phi, eps": ("phi", {"layer_norm_eps": 0.01}),
    "stablelm": ("stablelm", {}),
    "stablelm, share": ("stablelm", rope({"rope_type": "default", "partial_rotary_factor": 0.5})),
    "stablelm, bias": ("stablelm", {"use_qkv_bias": True}),
    "gpt2": ("gpt2", {}),
    "gpt2, gelu": ("gpt2", {"activation_function": "gelu"}),
    "gpt2, n_inner": ("gpt2", {"n_inner": 80}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2, by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, reordered": (
        "gpt2",
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2, eps": ("gpt2", {"layer_norm_epsilon": 0.01}),
}


def saved(folder: Path, kind: str, values: dict[str, Any]) -> tuple[Path, np.ndarray]:
    """(a model of transformers, its scores) with random weights, norms and biases too."""
    config = transformers.AutoConfig.for_model(
        kind, **{**(GPT2 if kind == "gpt2" else USUAL), **values}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15 + float(is_norm))
    model.eval().save_pretrained(folder)
    write_tokenizer(folder)
    # Read anew, for this is what transformers makes of the files.
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return folder, again(input_ids=torch.tensor([IDS])).logits[0].numpy()


def scores(folder: Path, fold: bool = False) -> np.ndarray:
    weights = CanonicalWeights(open_checkpoint(folder), fold=fold)
    return logits(weights, torch.tensor([IDS]))[0].numpy()


def change(folder: Path, changes: dict[str, Any], remove: tuple[str, ...] = ()) -> None:
    file = folder / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in remove}
    file.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "model", *CASES[case])
    bound = 1e-5 * np.abs(theirs).max()
    assert np.abs(scores(folder) - theirs).max() < bound
    # for runtimes that know no scale but 1 / sqrt(head size)
    assert np.abs(scores(folder, fold=True) - theirs).max() < bound


@pytest.mark.parametrize("case", ["linear", "llama3", "yarn", "longrope", "qwen2, yarn"])
def test_rope_as_older_configs_write_it(case: str, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "model", *CASES[case])
    parameters = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    change(folder, {"rope_scaling": parameters, "rope_theta": theta}, ("rope_parameters",))
    assert np.abs(scores(folder) - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["yarn", "qwen2, head_dim", "llama3", "longrope"])
@pytest.mark.parametrize("target", ["onnx", "tensorrt", "llamacpp"])
def test_an_engine_gives_the_same(case: str, target: str, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "model", *CASES[case])
    params = {"type": "f32"} if target == "llamacpp" else {"precision": "fp32"}
    engine = em.export(str(folder), target, str(tmp_path / "engine"), prompts=None, **params)
    session = engine.open(1)
    found = session.prefill(IDS, every=True).copy()
    session.close()
    assert np.abs(found - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_a_factor_on_scores_is_folded_once(tmp_path: Path) -> None:
    """A quantized checkpoint carries it in its q rows, and its config says so."""
    folder, theirs = saved(tmp_path / "model", *CASES["yarn"])
    step = plugins.load("steps", "quantize")
    (tmp_path / "packed").mkdir()
    params = step.Params(method="rtn", bits=8, group=32)
    step.run(open_checkpoint(folder), tmp_path / "packed", params)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["rope_parameters"]["attention_factor"] == 1.0
    assert np.abs(scores(tmp_path / "packed") - theirs).max() < 0.05 * np.abs(theirs).max()


def test_a_factor_on_a_part_of_each_head_is_refused(tmp_path: Path) -> None:
    parameters = {**YARN, "partial_rotary_factor": 0.5}
    folder, theirs = saved(tmp_path / "model", "phi", rope(parameters))
    with pytest.raises(EdgemedError, match="attention factor of 1.139 on a part of each head"):
        scores(folder)
    change(folder, rope({**parameters, "attention_factor": 1.0}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(scores(folder) - theirs).max() < 1e-5 * np.abs(theirs).max()


PUBLISHED = [
    ("linear", {"factor": 4.0}),
    ("dynamic", {"factor": 4.0}),
    ("llama3", {**LLAMA3, "original_max_position_embeddings": 8192}),
    ("llama3", {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}),
    ("yarn", {"factor": None, "original_max_position_embeddings": 8192}),
    ("yarn", {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707, "truncate": False}),
    (
        "yarn",
        {
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 64,
            "attention_factor": 0.9,
        },
    ),
    ("longrope", {"short_factor": [1.0 + n / 64 for n in range(64)], "long_factor": [9.0] * 64}),
]


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize(("kind", "values"), PUBLISHED)
def test_frequencies_and_factors_of_published_sizes(
    kind: str, values: dict[str, Any], theta: float
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {
        "hidden_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 131072,
    }
    parameters = {"rope_theta": theta, **values, "rope_type": kind}
    if kind == "longrope":
        parameters["original_max_position_embeddings"] = 4096
    config = transformers.LlamaConfig(**sizes, rope_parameters=dict(parameters))
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
    ours = all_families()["llama"].decoder({**sizes, "rope_parameters": parameters}, {})
    np.testing.assert_allclose(ours.rope_frequencies, frequencies.numpy(), rtol=5e-6)
    assert ours.score_scale[0] * 128**0.5 == pytest.approx(factor**2, rel=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_positions_of_three_parts(scaled: bool, nested: bool, tmp_path: Path) -> None:
    """M-RoPE, also with YaRN, as Qwen2-VL's model card tells people to write it."""
    parameters = {"mrope_section": [2, 3, 3], "type": "mrope"}
    if scaled:
        parameters = {**YARN, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config={**USUAL, "rope_parameters": {"rope_theta": 1e6, **parameters}},
        vision_config={"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 64},
        tie_word_embeddings=nested,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif "layers" in name:
                weight.mul_(6)
        theirs = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "model")
    if not nested:
        file = tmp_path / "model" / "config.json"
        values = json.loads(file.read_text())
        text = values.pop("text_config")
        text["rope_scaling"] = {**parameters}
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
        text.pop("model_type")
        file.write_text(json.dumps({**text, **values}))
    assert np.abs(scores(tmp_path / "model") - theirs).max() < 1e-5 * np.abs(theirs).max()
