"""A damaged number or a wrong type in any document of a checkpoint ends in one line, soon.

Mutations of published configs and of a tiny model's documents: every value that may stand in JSON
at every key.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemed.errors import EdgemedError
from edgemed.models.architecture import family_of

CONFIGS = {
    file.stem: json.loads(file.read_text())
    for file in sorted((ROOT / "tests/data/configs").glob("*.json"))
}
HOSTILE = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**5000, -(10**400)),
        *(0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), 64.0),
        *("", "64", "silu", "linear", "\ud800", "x" * 5000, "yarn", "../x", "\x00"),
        *([], [1], [[]], [None], ["a"], list(range(999)), {}, {"a": 1}, {"": {}}),
        *({"type": "yarn"}, {"rope_type": "llama3", "factor": 1}, [{"a": []}], [1e300, "x"]),
    ]
) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
PREPROCESSOR = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "resample": 3,
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PIXELS = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value may be put: every key and every position of a document."""
    found = []
    if isinstance(value, dict):
        for key, item in value.items():
            found += [(*path, key), *places(item, (*path, key))]
    elif isinstance(value, list):
        for n, item in enumerate(value[:3]):
            found += [(*path, n), *places(item, (*path, n))]
    return found


def put(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(document)
    inside = result
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return result


def quietly(config: dict[str, Any], preprocessor: dict[str, Any]) -> None:
    began = time.monotonic()
    message = ""
    try:
        family = family_of(config, "config.json")
        d = family.decoder(config, {})
        if family.vision:
            family.vision(config, preprocessor, {})
        if d.experts is None:
            family.parts(d)
    except EdgemedError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1200
    assert time.monotonic() - began < 5


@settings(max_examples=700)
@given(st.data())
def test_any_value_at_any_key_of_a_config(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    config = CONFIGS[name]
    path = data.draw(st.sampled_from(places(config)))
    quietly(put(config, path, data.draw(HOSTILE)), {})


@settings(max_examples=150)
@given(st.data())
def test_keys_left_out_and_put_in(data: st.DataObject) -> None:
    config = copy.deepcopy(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=4, unique=True)):
        del config[key]
    extra = st.sampled_from(
        ["head_dim", "rope_scaling", "rope_parameters", "text_config", "layer_types", "moe", "x"]
    )
    config |= data.draw(st.dictionaries(extra | st.text(max_size=9), HOSTILE, max_size=3))
    quietly(config, {})


@settings(max_examples=200)
@given(st.data())
def test_any_value_in_a_preprocessor(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["llava-1.5-7b-hf", "qwen2-vl-2b-instruct"]))
    document = PIXELS if "qwen" in name else PREPROCESSOR
    path = data.draw(st.sampled_from(places(document)))
    quietly(CONFIGS[name], put(document, path, data.draw(HOSTILE)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("hostile") / "model"
    write_model(path, family="llama")
    document = {"eos_token_id": 256, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (path / "generation_config.json").write_text(json.dumps(document))
    return path


FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "tie_word_embeddings", "eos_token_id", "hidden_act"),
    *("attention_bias", "model_type", "quantization_config", "architectures", "new_key"),
)
VALUES = (
    *(None, "x", -1, 0, 10**9, 1e300, float("nan"), [], {}, True, 1.5, [3], {"bits": 4}),
    *(2**64, "10", [None], {"quant_method": "gptq"}),
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_checkpoint_with_any_value(field: str, tiny: Path, tmp_path: Path) -> None:
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights

    path = tmp_path / "model"
    shutil.copytree(tiny, path)
    config = json.loads((path / "config.json").read_text())
    for value in VALUES:
        (path / "config.json").write_text(json.dumps({**config, field: value}))
        began = time.monotonic()
        message = ""
        try:
            CanonicalWeights(open_checkpoint(path))
        except EdgemedError as error:
            message = str(error)
        assert "\n" not in message
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("name", "document", "message"),
    [
        ("generation_config.json", {"new": 1}, "generation_config.json: new 1 is a key"),
        ("generation_config.json", {"suppress_tokens": [2]}, "suppress_tokens .2. is not supp"),
        ("tokenizer_config.json", {"new": [1]}, "tokenizer_config.json: new .1. is a key"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens True"),
        ("processor_config.json", {"new": "x"}, "processor_config.json: new 'x' is a key"),
        ("generation_config.json", [1], "is not a JSON object"),
    ],
)
def test_documents_beside_the_config(
    name: str, document: Any, message: str, tiny: Path, tmp_path: Path
) -> None:
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights

    path = tmp_path / "model"
    shutil.copytree(tiny, path)
    (path / name).write_text(json.dumps(document))
    with pytest.raises(EdgemedError, match=message):
        CanonicalWeights(open_checkpoint(path))
    if isinstance(document, dict) and "new" in document:
        (path / name).write_text(json.dumps({**document, "edgemed_accepted_keys": ["new"]}))
        assert CanonicalWeights(open_checkpoint(path)).decoder.layers == 2


def test_special_tokens_have_any_name(tmp_path: Path) -> None:
    from edgemed.models.document_keys import check_documents

    document = {"image_token": "<image>", "boi_token": {"content": "<boi>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(document))
    check_documents(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"image_token": 5}))
    with pytest.raises(EdgemedError, match="image_token 5 is a key"):
        check_documents(tmp_path)


@pytest.mark.parametrize("value", [[1], "x", 5, {"image_processr": "x"}])
def test_preprocessors_that_are_no_objects(value: Any) -> None:
    with pytest.raises(EdgemedError, match="preprocessor_config.json"):
        family_of(CONFIGS["llava-1.5-7b-hf"], "config.json").vision(
            CONFIGS["llava-1.5-7b-hf"], value, {}
        )
