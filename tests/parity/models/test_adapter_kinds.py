"""Every kind of adapter a user brings: merged as peft merges it, or refused by its cause.

The right scores come from peft: the adapter as it was trained, or loaded again by peft itself.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from conftest import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgemed.errors import EdgemedError
from edgemed.models.adapter_files import LORA_KEYS
from edgemed.models.adapter_targets import alpha_of, is_targeted, rank_of
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.lora import read_lora
from edgemed.models.peft_merge import peft_config
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.steps import merge

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.tensor([[7, 3, 99, 12, 41, 8, 5, 77]])
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(tied: bool = False) -> torch.nn.Module:
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied, attention_bias=True)
    return transformers.LlamaForCausalLM(config)


def qwen2_vl(tied: bool = False) -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 14}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=101,
        video_token_id=102,
        vision_start_token_id=103,
        vision_end_token_id=104,
        tie_word_embeddings=tied,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def llava(tied: bool = False) -> torch.nn.Module:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 32,
    }
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_index=101,
        tie_word_embeddings=tied,
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS = {"llama": llama, "qwen2_vl": qwen2_vl, "llava": llava}


def noise(model: torch.nn.Module, scale: float, trained: bool) -> None:
    """Random weights: in the whole model, or added to what is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained and parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
            elif not trained:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
                if "norm" in name:
                    parameter.add_(1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    paths = {}
    for kind, make in MODELS.items():
        for tied in (False, True):
            model = make(tied)
            noise(model, 0.15, trained=False)
            path = folder / f"{kind}{'-tied' * tied}"
            model.save_pretrained(path)
            write_tokenizer(path)
            paths[path.name] = path
    return paths


def loaded(path: Path) -> Any:
    auto = "AutoModelForCausalLM" if "llama" in path.name else "AutoModelForImageTextToText"
    return getattr(transformers, auto).from_pretrained(path, dtype=torch.float32)


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def adapter(base: Path, out: Path, config: Any, **options: object) -> torch.Tensor:
    """A saved adapter with weights far from zero; its scores as peft loads it again."""
    model = peft.get_peft_model(loaded(base), config)
    noise(model, 0.05, trained=True)
    model.save_pretrained(out, **options)
    again = peft.PeftModel.from_pretrained(loaded(base), out)
    return scores(again)


def merged(base: Path, folder: Path, out: Path, **params: object) -> CanonicalWeights:
    out.mkdir()
    merge.run(open_checkpoint(base), out, merge.Params(adapter=str(folder), **params))
    return CanonicalWeights(open_checkpoint(out))


def check(weights: CanonicalWeights, expected: torch.Tensor) -> None:
    found = logits(weights, TOKENS)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def lora(**options: object) -> Any:
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    return peft.LoraConfig(**{**values, "init_lora_weights": False, **options})


TEXT_MODULES = r".*(?<!visual)\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
KINDS = {
    "rank and alpha by pattern": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*\.0\..*down_proj": 8},
        "alpha_pattern": {"q_proj": 3, "down_proj": 5},
    },
    "rslora by pattern": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "all biases": {"bias": "all"},
    "its own biases": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "k_proj"]},
    "a pattern": {"target_modules": TEXT_MODULES},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "new rows": {"trainable_token_indices": [5, 7, 99]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "output": {"target_modules": ["lm_head", "q_proj"]},
    "embedding and output saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "output saved": {"modules_to_save": ["lm_head"]},
    "norms saved": {"modules_to_save": ["input_layernorm", "norm"]},
    "tied by wish": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("base", ["llama", "llama-tied", "qwen2_vl-tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_loads_it(bases, tmp_path: Path, base: str, kind: str) -> None:
    expected = adapter(bases[base], tmp_path / "adapter", lora(**KINDS[kind]))
    check(merged(bases[base], tmp_path / "adapter", tmp_path / "out"), expected)


# --- names


def with_old_names(folder: Path, out: Path, old: str, **config: object) -> Path:
    """An adapter as it was saved by an older transformers."""
    shutil.copytree(folder, out)
    file = out / "adapter_model.safetensors"
    save_file(
        {name.replace("model.language_model.", old): t for name, t in load_file(file).items()},
        file,
    )
    text = (out / "adapter_config.json").read_text()
    (out / "adapter_config.json").write_text(json.dumps({**json.loads(text), **config}))
    return out


NAMED: dict[str, dict[str, object]] = {
    "names": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "ranks": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.mlp.down_proj": 3},
    },
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize(
    ("model", "old"), [("qwen2_vl", "model."), ("llava", "language_model.model.")]
)
def test_old_names_of_a_vision_model(
    bases, tmp_path: Path, model: str, old: str, kind: str
) -> None:
    values = NAMED[kind]
    # LLaVA's vision encoder has a q_proj too, which the old names leave as they are.
    expected = adapter(bases[model], tmp_path / "new", lora(**values))
    folder = with_old_names(tmp_path / "new", tmp_path / "old", old)
    check(merged(bases[model], folder, tmp_path / "out"), expected)
    check(merged(bases[model], tmp_path / "new", tmp_path / "out2"), expected)


def test_patterns_of_old_names(bases, tmp_path: Path) -> None:
    # As they were written for the old names: in full, by pattern, by layer.
    values = {
        "target_modules": TEXT_MODULES,
        "rank_pattern": {r"model.language_model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r"model.language_model.layers.0.mlp.down_proj": 3},
    }
    expected = adapter(bases["qwen2_vl"], tmp_path / "new", lora(**values))
    old = {
        "target_modules": r"model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
        "rank_pattern": {r"^model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r"^model.layers.0.mlp.down_proj": 3},
    }
    folder = with_old_names(tmp_path / "new", tmp_path / "old", "model.", **old)
    check(merged(bases["qwen2_vl"], folder, tmp_path / "out"), expected)


def test_a_config_that_asks_for_more_than_the_file_holds(bases, tmp_path: Path) -> None:
    adapter(bases["llama"], tmp_path / "adapter", lora())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(tensors, file)
    with pytest.raises(EdgemedError, match=r"has no '.*layers\.1\.mlp.*which its config asks for"):
        merged(bases["llama"], tmp_path / "adapter", tmp_path / "out")
    weights = CanonicalWeights(open_checkpoint(bases["llama"]))
    with pytest.raises(EdgemedError, match=r"no factors of '.*layers\.1\.mlp\.down_proj'"):
        read_lora(weights, "a", str(tmp_path / "adapter"))


def test_names_are_matched_as_peft_matches_them(bases) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    modules = [name for name, _ in loaded(bases["qwen2_vl"]).named_modules() if name]
    configs = [KINDS[kind] for kind in KINDS if KINDS[kind].get("target_modules") != "all-linear"]
    configs += [
        {"layers_to_transform": 0, "exclude_modules": r".*down.*"},
        {"target_modules": ["model.language_model.layers.0.self_attn.q_proj", "proj"]},
        {
            "layers_to_transform": [0],
            "target_modules": ["qkv", "fc1"],
            "layers_pattern": ["blocks"],
        },
    ]
    for options in configs:
        config = lora(**options)
        values = config.to_dict()
        for module in modules:
            wanted = check_target_module_exists(config, module)
            is_wanted = bool(wanted) and type(wanted).__name__ != "_ExcludedModule"
            assert is_targeted(values, module) == is_wanted, (options, module)
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
            assert rank_of(values, module) == rank
            key = get_pattern_key(config.alpha_pattern, module)
            assert alpha_of(values, module) == config.alpha_pattern.get(key, config.lora_alpha)


# --- vocabularies


def grown(base: Path, out: Path, config: Any, size: int) -> torch.Tensor:
    """An adapter trained on a base whose vocabulary was widened first; the scores of its training."""
    model = loaded(base)
    model.resize_token_embeddings(size)
    model = peft.get_peft_model(model, config)
    noise(model, 0.05, trained=True)
    expected = scores(model)
    model.save_pretrained(out)
    return expected


WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}


# peft notices that a vocabulary grew where config.json names its size at the root.
@pytest.mark.parametrize(("base", "saved"), [("llama", WHOLE), ("llama", {}), ("qwen2_vl", WHOLE)])
def test_a_vocabulary_that_the_adapter_brings(
    bases, tmp_path: Path, base: str, saved: dict
) -> None:
    folder = tmp_path / "adapter"
    expected = grown(bases[base], folder, lora(**saved), 123)
    shutil.copy(bases[base] / "tokenizer.json", folder / "tokenizer.json")
    weights = merged(bases[base], folder, tmp_path / "out")
    assert weights.decoder.vocab == 123
    check(weights, expected)


def test_a_vocabulary_that_the_adapter_does_not_bring(bases, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    grown(bases["llama"], folder, lora(**WHOLE), 123)
    file = folder / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if "lm_head" not in name}
    save_file(tensors, file)
    with pytest.raises(EdgemedError, match=r"trained with a vocabulary of 123 tokens.*has 120"):
        merged(bases["llama"], folder, tmp_path / "out")


@pytest.mark.parametrize("saved", [WHOLE, {}])
def test_a_base_that_was_resized_and_saved(bases, tmp_path: Path, saved: dict) -> None:
    model = loaded(bases["llama"])
    model.resize_token_embeddings(123)
    model.save_pretrained(tmp_path / "resized-llama")
    write_tokenizer(tmp_path / "resized-llama")
    tuned = peft.get_peft_model(model, lora(**saved))
    noise(tuned, 0.05, trained=True)
    tuned.save_pretrained(tmp_path / "adapter")
    check(merged(tmp_path / "resized-llama", tmp_path / "adapter", tmp_path / "out"), scores(tuned))


def test_two_copies_that_differ(bases, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    grown(bases["llama"], folder, lora(**WHOLE), 123)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [name for name in tensors if ".modules_to_save." in name]
    name = "base_model.model.lm_head.modules_to_save.weight"
    tensors[name] = tensors["base_model.model.lm_head.weight"] + 1
    assert copies or name in tensors
    save_file(tensors, file)
    with pytest.raises(EdgemedError, match="differ, and are of one module"):
        merged(bases["llama"], folder, tmp_path / "out")


# --- refused by name

REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "kasa": ({"kasa_config": {"a": 1}}, "kasa_config"),
    "corda": ({"init_lora_weights": "corda"}, "corda.*took something out"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "lora_ga.*took something out"),
    "fast pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*took something out"),
    "unknown beginning": ({"init_lora_weights": "magic"}, "init_lora_weights 'magic' is not read"),
    "unknown key": ({"use_magic": True}, "the key use_magic true is not read"),
    "peft 0.2": ({"enable_lora": [True, False]}, "enable_lora"),
    "rank 0": ({"r": 0}, "r is 0, and not a whole number"),
    "rank 1e9": ({"r": 10**9}, "largest tensor has"),
    "rank as text": ({"r": "4"}, "r is 4, and not"),
    "rank as float": ({"r": 4.0}, r"r is 4\.0, and not"),
    "a larger rank": ({"r": 5}, r"is \[4, 96\], the base needs \[5, 96\]"),
    "rank null": ({"r": True}, "r is true"),
    "pattern rank 1e9": ({"rank_pattern": {"q_proj": 10**9}}, "largest tensor has"),
    "pattern rank 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' is 0"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha is 8, and not a number"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "."),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "digits"),
    "alpha as list": ({"alpha_pattern": [["q_proj", 3]]}, "alpha_pattern is"),
    "alpha pattern as text": ({"alpha_pattern": {"q_proj": "a"}}, "alpha_pattern 'q_proj'"),
    "no expression": ({"rank_pattern": {"(": 4}}, "is no regular expression"),
    "targets no expression": ({"target_modules": "q_proj("}, "is no regular expression"),
    "targets for ever": ({"target_modules": "(a+)+$"}, "could take for ever"),
    "excluded no expression": ({"exclude_modules": "["}, "is no regular expression"),
    "layers no expression": (
        {"layers_pattern": "(", "layers_to_transform": [0]},
        "is no regular expression",
    ),
    "saved no expression": ({"modules_to_save": ["("]}, "is no regular expression"),
    "targets of numbers": ({"target_modules": [3]}, "target_modules is"),
    "targets nested": ({"target_modules": {"a": 1}}, "target_modules is"),
    "tokens as text": ({"trainable_token_indices": "5"}, "trainable_token_indices is"),
    "tokens below 0": ({"trainable_token_indices": [-1]}, "trainable_token_indices is"),
    "layers as text": ({"layers_to_transform": "1"}, "layers_to_transform is"),
    "bias of all": ({"bias": "some"}, "bias is some, and not"),
    "dropout 2": ({"lora_dropout": 2}, "lora_dropout is 2"),
    "a flag as text": ({"use_dora": "false"}, "use_dora is false, and not true or false"),
    "a kind as list": ({"peft_type": ["LORA"]}, "no peft_type"),
    "task as number": ({"task_type": 3}, "task_type is 3"),
}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    adapter(bases["llama"], folder, lora())
    return folder


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(bases, plain: Path, tmp_path: Path, kind: str) -> None:
    changes, match = REFUSED[kind]
    folder = shutil.copytree(plain, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(EdgemedError, match=match) as caught:
        merged(bases["llama"], folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    weights = CanonicalWeights(open_checkpoint(bases["llama"]))
    with pytest.raises(EdgemedError) as caught:
        read_lora(weights, "a", str(folder))
    assert "\n" not in str(caught.value)


# --- any bytes, any JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


ODD: tuple[object, ...] = (-1, 1e300, "(", [], [[]], {"a": []}, True, 2**80, "\ud800", [None])


def read(base: CanonicalWeights, folder: Path) -> None:
    """What export does with an adapter. Any other exception than EdgemedError fails the test."""
    with contextlib.suppress(EdgemedError):
        read_lora(base, "a", str(folder))


@given(changes=st.dictionaries(st.sampled_from(sorted(LORA_KEYS)), JSON, min_size=1, max_size=3))
def test_any_config(bases, plain: Path, changes: dict) -> None:
    weights = CanonicalWeights(open_checkpoint(bases["llama"]))
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(plain, Path(folder) / "adapter")
        file = copy / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        read(weights, copy)


@pytest.mark.parametrize("changes", [{key: value} for key in LORA_KEYS for value in ODD])
def test_odd_values_when_merging(plain: Path, changes: dict, tmp_path: Path) -> None:
    copy = shutil.copytree(plain, tmp_path / "adapter")
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with contextlib.suppress(EdgemedError):
        peft_config(str(copy))


@given(data=st.data())
@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_any_bytes_of_weights(bases, plain: Path, form: str, data: st.DataObject) -> None:
    weights = CanonicalWeights(open_checkpoint(bases["llama"]))
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(plain, Path(folder) / "adapter")
        file = copy / "adapter_model.safetensors"
        if form != "safetensors":
            tensors = load_file(file)
            file.unlink()
            file = copy / "adapter_model.bin"
            torch.save(tensors, file, _use_new_zipfile_serialization=form == "zip")
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, min(len(content) - 1, 2500)))
            content[place] = data.draw(st.integers(0, 255))
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        read(weights, copy)
