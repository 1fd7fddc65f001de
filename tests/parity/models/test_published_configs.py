"""Configs as they are published and as training tools save them are read, and as transformers reads
them.

tests/data/configs/ holds them: written down by hand after the published files, without weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig, family_of
from edgemed.models.config_reader import ACCEPTED
from edgemed.models.document_keys import accepted_keys, check_documents
from edgemed.models.quantization_config import KEYS, check_keys

FILES = {file.stem: file for file in sorted((ROOT / "tests/data/configs").glob("*.json"))}
# transformers has no class of these.
OUTSIDE = ("stablelm-epoch", "moe-", "llava-med", "llava-v1.5", "huatuo")
NATIVE = [name for name in FILES if not name.startswith(OUTSIDE)]


def config_of(name: str) -> dict[str, Any]:
    return json.loads(FILES[name].read_text())


def read(config: dict[str, Any]) -> DecoderConfig:
    family = family_of(config, "config.json")
    d = family.decoder(config, {})
    if family.vision:
        family.vision(config, {}, {})
    if quantization := config.get("quantization_config"):
        check_keys(Path("model"), quantization, KEYS[quantization["quant_method"]])
    return d


@pytest.mark.parametrize("name", FILES)
def test_published_configs_are_read(name: str) -> None:
    d = read(config_of(name))
    assert d.layers >= 12
    assert d.heads % d.kv_heads == 0


@pytest.mark.parametrize("name", NATIVE)
def test_their_numbers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copyfile(FILES[name], tmp_path / "config.json")
    whole = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = whole.get_text_config()
    d = read(config_of(name))
    assert (d.hidden, d.layers, d.heads, d.vocab) == (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.vocab_size,
    )
    assert d.tied == whole.tie_word_embeddings
    stop = transformers.GenerationConfig.from_model_config(whole).eos_token_id
    stop = stop if isinstance(stop, list) else [stop] if stop is not None else []
    assert d.stop_tokens == tuple(stop)
    assert d.eos == (stop[0] if stop else None)
    if theirs.model_type == "gpt2":
        assert d.norm_eps == theirs.layer_norm_epsilon
        return
    assert d.kv_heads == theirs.num_key_value_heads
    assert d.norm_eps == getattr(theirs, "rms_norm_eps", None) or theirs.layer_norm_eps
    window = getattr(theirs, "sliding_window", None) or theirs.max_position_embeddings
    assert d.context == min(window, theirs.max_position_embeddings)
    frequencies, factor = rope_of(theirs)
    np.testing.assert_allclose(d.rope_frequencies, frequencies, rtol=5e-6)
    assert d.score_scale[0] * d.head_dim**0.5 == pytest.approx(factor**2)


def rope_of(config: Any) -> tuple[np.ndarray, float]:
    """(frequencies, factor on cosines and sines) of transformers' own module."""
    import importlib

    kind = config.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    names = [n for n in dir(module) if n.endswith("RotaryEmbedding") and "Vision" not in n]
    rotary = getattr(module, names[0])(config)
    return rotary.inv_freq.numpy(), rotary.attention_scaling


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama-2-7b-hf", "attention_multiplier"),
        ("qwen2.5-1.5b", "use_qk_norm"),
        ("phi-2", "rope_scalng"),
        ("gpt2", "alibi"),
        ("llava-med-v1.5-mistral-7b", "mm_new_projector"),
        ("moe-tinymed", "moe_new"),
        ("qwen2-vl-2b-instruct", "fullatt_block_indexes"),
    ],
)
def test_an_unknown_key_is_named_and_can_be_accepted(name: str, key: str) -> None:
    config = config_of(name) | {key: 0.5}
    with pytest.raises(EdgemedError, match=f"config.json: {key} 0.5 is a key that edgemed does"):
        read(config)
    assert read(config | {ACCEPTED: [key]}) == read(config_of(name))
    # null asks for nothing
    assert read(config_of(name) | {key: None}) == read(config_of(name))


def test_two_names_of_one_number() -> None:
    config = config_of("stablelm-epoch")
    assert read(config | {"partial_rotary_factor": None}) == read(config)
    assert read(config | {"partial_rotary_factor": 0.25}) == read(config)
    assert read(config | {"rope_pct": None}) == read(config)
    with pytest.raises(EdgemedError, match="two names of one number"):
        read(config | {"partial_rotary_factor": 0.5})


def test_a_mistyped_key_is_guessed() -> None:
    config = config_of("llama-2-7b-hf") | {"rope_thetaa": 5e5}
    with pytest.raises(EdgemedError, match="Did you mean 'rope_theta'"):
        read(config)


def test_unknown_keys_of_nested_configs() -> None:
    config = config_of("llava-1.5-7b-hf")
    config["text_config"] |= {"logit_scale": 0.1}
    with pytest.raises(EdgemedError, match=r"text_config\.logit_scale 0\.1 is a key"):
        read(config)
    config[ACCEPTED] = ["text_config.logit_scale"]
    assert read(config).layers == 32
    config["vision_config"] |= {"register_tokens": 4}
    with pytest.raises(EdgemedError, match=r"vision_config\.register_tokens 4 is a key"):
        read(config)


def test_what_was_accepted_is_told(tmp_path: Path) -> None:
    """An engine's manifest holds it."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"new": 1, ACCEPTED: ["new"]}))
    config = {"model_type": "llama", ACCEPTED: ["b", "a"]}
    check_documents(tmp_path)
    assert accepted_keys(tmp_path, config) == [
        "config.json: a",
        "config.json: b",
        "tokenizer_config.json: new",
    ]
    assert accepted_keys(tmp_path / "none", {}) == []
    for names in ("a", [1], {"a": 1}):
        with pytest.raises(EdgemedError, match=f"{ACCEPTED} is .*, not a list of names"):
            read(config_of("phi-2") | {ACCEPTED: names})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("phi-2", {"qk_layernorm": True}, "qk_layernorm True is not supported"),
        ("stablelm-2-1_6b", {"use_parallel_residual": True}, "use_parallel_residual True"),
        ("stablelm-2-1_6b", {"head_dim": 128}, "head_dim 128 is not supported. Known: 64"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads {'0': .1.} is not supported"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ("gpt2", {"hidden_size": 1024}, "n_embd 768 and hidden_size 1024 are two names of one"),
        ("smollm2-135m-instruct", {"rope_interleaved": True}, "rope_interleaved True"),
        ("llama-2-7b-hf", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("llama-2-7b-hf", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama-2-7b-hf", {"suppress_tokens": [1]}, "suppress_tokens .1. is not supported"),
        (
            "llama-2-7b-hf",
            {"num_key_value_heads": 5},
            "num_attention_heads 32 is not a multiple of num_key_value_heads 5",
        ),
        ("llama-2-7b-hf", {"num_attention_heads": 33}, "4096 is not a multiple of the 33 heads"),
        ("qwen2-7b-instruct", {"use_sliding_window": True, "sliding_window": 4096,
                               "max_window_layers": 20}, "layer 20 has 'sliding_attention'"),
        ("qwen2-7b-instruct", {"layer_types": ["full_attention"]}, "layer_types .* is not a list"),
        ("qwen2-vl-transformers-5", {"hidden_size": 8}, "hidden_size 8 and text_config.hidden_size"
                                                        " 1536 contradict each other"),
        ("llama-2-7b-gptq", {"quantization_config": {"quant_method": "gptq", "rotation": "h"}},
         "rotation"),
        ("llama-2-7b-hf", {"quantization": {"bits": 4}}, "quantization {'bits': 4}"),
        ("moe-tinymed", {"moe": {"num_experts": [4], "use_residual": True}},
         "moe.use_residual True is not supported"),
    ],
)  # fmt: skip
def test_what_no_graph_computes_is_refused_by_name(
    name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgemedError, match=message):
        read(config_of(name) | change)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear"}, "rope_scaling.factor is missing, and rope type 'linear' needs it"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
        ({"type": "linear", "factor": "2"}, "factor '2' is not a number above"),
        ({"type": "linear", "factor": 0}, "factor 0 is not a number above"),
        ({"type": "linear", "factor": True}, "factor True is not a number above"),
        ({"type": "linear", "factor": float("nan")}, "factor nan is not a number above"),
        ({"type": "linear", "factor": 10**400}, "is not a number above"),
        ({"type": None}, "type None is not the name of a rope type"),
        ({"type": ["linear"]}, "type .'linear'. is not the name of a rope type"),
        ("linear", "rope_scaling 'linear' is not an object"),
        ([1], "rope_scaling .1. is not an object"),
        ({"type": "linear", "scaling_factor": 2.0}, "factor is missing"),
        ({"factor": 2.0}, "rope_scaling.factor 2.0 is a key that edgemed does not know"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast 3 is a key"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor 1.0 is not above low_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": -1}, "not a whole number from 2"),
        ({"rope_type": "su"}, "rope_type 'su' is not supported. Known: default, linear"),
        ({"rope_type": "proportional"}, "rope_type 'proportional' is not supported"),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_type 'mrope' is not supported"),
        ({"rope_type": "default", "type": "yarn", "factor": 2.0}, "contradict each other"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention is an object"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}, "is not at least"),
        ({"type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate 'no' is not true or false"),
        ({"type": "yarn", "factor": 4.0, "attention_factor": -1}, "attention_factor -1 is not"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "a list of 64 numbers"),
        (
            {"type": "linear", "factor": 2.0, "rope_theta": 0},
            "rope_theta 0 is not a number above 1",
        ),
    ],
)
def test_malformed_rope_dicts(scaling: Any, message: str) -> None:
    with pytest.raises(EdgemedError, match=message):
        read(config_of("llama-2-7b-hf") | {"rope_scaling": scaling})
    if isinstance(scaling, dict):
        with pytest.raises(EdgemedError):
            read(config_of("llama-2-7b-hf") | {"rope_parameters": scaling})


def test_two_rope_dicts() -> None:
    config = config_of("llama-transformers-5")
    assert read(config | {"rope_scaling": config["rope_parameters"]}) == read(config)
    with pytest.raises(EdgemedError, match="two descriptions of one thing"):
        read(config | {"rope_scaling": {"type": "linear", "factor": 2.0}})


def test_what_stands_outside_of_the_rope_dict_comes_first() -> None:
    config = config_of("llama-2-yarn-64k")
    stated = read(config | {"original_max_position_embeddings": 8192})
    inside = config | {"rope_scaling": {**config["rope_scaling"],
                                        "original_max_position_embeddings": 8192}}  # fmt: skip
    assert stated == read(inside) != read(config)


@pytest.mark.parametrize("name", ["mrope_section", "type"])
def test_sections_of_positions(name: str) -> None:
    config = config_of("qwen2-vl-2b-instruct")
    for value in (
        [16, 24],
        [16, 24, 25],
        "16",
        [-1, 32, 32],
        [True, 31, 32],
        [1e30, 1, 2],
        {"a": 1},
        5,
    ):
        config["rope_scaling"] = {"mrope_section": [16, 24, 24], "type": "mrope", name: value}
        with pytest.raises(EdgemedError, match="rope_scaling"):
            read(config)
