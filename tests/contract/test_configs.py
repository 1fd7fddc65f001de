"""Every key of transformers' own configuration classes is understood, supported with one value, or
harmless, and what a missing key means is read from these classes here.

The lists of keys stand with the families. A new version of transformers that adds a field, or
changes a default, fails here first.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgemed.models.adapter_files import LORA_KEYS, REFUSED
from edgemed.models.architecture import Architecture, all_families
from edgemed.models.config_keys import FIXED, HARMLESS
from edgemed.models.config_reader import ACCEPTED, REQUIRED, ConfigKeys, ConfigReader
from edgemed.models.document_keys import GENERATION, TOKENIZER_CONFIG
from edgemed.models.quantization_config import BITSANDBYTES_KEYS, GPTQ_KEYS
from edgemed.models.random_weights import reference_config

transformers = pytest.importorskip("transformers")
FAMILIES = all_families()
CLASSES = [
    (family, name, keys)
    for family in FAMILIES.values()
    for name, keys in family.config_keys.items()
]
# Not fields of the classes: what they take from the arguments of older configs.
OLDER = {
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "_name_or_path",
    "conversation",
    "model_type",
    "eos_token_id",
    "head_dim",
    "tie_word_embeddings",
}
NAMES = [f"{family.name}-{name}" for family, name, _ in CLASSES]


def config_class(name: str) -> Any:
    import transformers.models.qwen2_vl.configuration_qwen2_vl as qwen2_vl

    return getattr(transformers, name, None) or getattr(qwen2_vl, name)


def defaults_of(name: str) -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(config_class(name))
        if field.default is not dataclasses.MISSING
    }


@pytest.mark.parametrize(("family", "name", "keys"), CLASSES, ids=NAMES)
def test_every_field_of_the_class_is_declared(
    family: Architecture, name: str, keys: ConfigKeys
) -> None:
    assert not set(defaults_of(name)) - keys.names()


@pytest.mark.parametrize(("family", "name", "keys"), CLASSES, ids=NAMES)
def test_defaults_are_those_of_the_class(family: Architecture, name: str, keys: ConfigKeys) -> None:
    fields = defaults_of(name)
    assert set(keys.defaults) - set(fields) <= OLDER
    for key, default in keys.defaults.items():
        if key in fields and default is not REQUIRED:
            assert default == fields[key], key
    if "rope_theta" in keys.defaults:
        assert keys.defaults["rope_theta"] == config_class(name).default_theta
    for key, values in keys.fixed.items():
        if key in fields and fields[key] is not None:
            assert fields[key] in values, key


@pytest.mark.parametrize("name", ["PhiConfig", "StableLmConfig"])
def test_rotated_share(name: str) -> None:
    """Not a field of the class, but an argument with a default."""
    family = next(f for f in FAMILIES.values() if name in f.config_keys)
    share = config_class(name)().rope_parameters["partial_rotary_factor"]
    config = {k: v for k, v in family.reference_config.items() if k != "partial_rotary_factor"}
    d = family.decoder(config, {})
    assert 2 * len(d.rope_frequencies) == int(d.head_dim * share)


def test_mistral_as_a_text_model() -> None:
    """LLaVA's text model of that name is read as a Llama with other defaults."""
    family = FAMILIES["llava"]
    fields = defaults_of("MistralConfig")
    d = family.decoder({"model_type": "llava", "text_config": {"model_type": "mistral"}}, {})
    assert (d.hidden, d.layers, d.heads) == (
        fields["hidden_size"],
        fields["num_hidden_layers"],
        fields["num_attention_heads"],
    )
    assert (d.kv_heads, d.ffn, d.vocab) == (
        fields["num_key_value_heads"],
        fields["intermediate_size"],
        fields["vocab_size"],
    )
    assert d.context == fields["sliding_window"]
    assert (d.norm_eps, d.eos) == (fields["rms_norm_eps"], fields["eos_token_id"])
    assert not {key for key in fields if key != "sliding_window"} - (
        FAMILIES["llama"].config_keys["LlamaConfig"].names()
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_sizes_of_a_nested_text_model(kind: str) -> None:
    """transformers leaves what equals a default out of a nested config."""
    model = transformers.AutoConfig.for_model(kind)
    d = FAMILIES["llava"].decoder({"model_type": "llava", "text_config": {"model_type": kind}}, {})
    assert (d.hidden, d.layers, d.heads, d.kv_heads, d.ffn, d.vocab) == (
        model.hidden_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.intermediate_size,
        model.vocab_size,
    )


@pytest.mark.parametrize("name", [*FAMILIES, *FAMILIES["moe_llava"].other_references])
def test_what_is_declared_as_understood_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES.get(name, FAMILIES["moe_llava"])
    config = dict(family.other_references.get(name, family.reference_config))
    read: dict[int, set[str]] = {}
    declared: dict[int, set[str]] = {}

    def remember(reader: ConfigReader, key: str) -> Any:
        read.setdefault(id(reader.keys), set()).add(key)
        return original(reader, key)

    def declare(reader: ConfigReader, values: Any, keys: ConfigKeys, place: str = "") -> None:
        declared[id(keys)] = set(keys.defaults)
        alive.append(keys)
        started(reader, values, keys, place or "config.json")

    alive: list[ConfigKeys] = []
    original = ConfigReader.raw
    started = ConfigReader.__init__
    stated = ConfigReader.states
    monkeypatch.setattr(ConfigReader, "raw", remember)
    monkeypatch.setattr(ConfigReader, "__init__", declare)
    monkeypatch.setattr(
        ConfigReader,
        "states",
        lambda reader, key: (
            read.setdefault(id(reader.keys), set()).add(key),
            stated(reader, key),
        )[1],
    )
    family.decoder(config, {})
    if family.vision:
        family.vision(config, {}, {})
    unread = {key for number, keys in declared.items() for key in keys - read.get(number, set())}
    # Read by who chooses the parts and the prompt, or only where another key asks for them.
    assert unread <= {
        *("model_type", "_name_or_path", "conversation", "type", "rope_type", "vision_config"),
        *("original_max_position_embeddings", "meta_expert", "eos_token_id"),
        *("rope_theta", "sliding_window", "do_pad"),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_config_is_the_callers_own(name: str) -> None:
    """transformers' config classes write into the mappings they get, so nothing is shared."""
    config = reference_config(name)
    before = json.dumps(FAMILIES[name].reference_config, default=str)
    for value in config.values():
        if isinstance(value, dict):
            value["written"] = True
    assert json.dumps(FAMILIES[name].reference_config, default=str) == before


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (GENERATION.names(), lambda: set(vars(transformers.GenerationConfig()))),
        (
            {*LORA_KEYS, *REFUSED},
            lambda: {
                field.name for field in dataclasses.fields(pytest.importorskip("peft").LoraConfig)
            },
        ),
        (set(GPTQ_KEYS), lambda: set(transformers.GPTQConfig(bits=4).to_dict())),
        (
            set(BITSANDBYTES_KEYS),
            lambda: set(transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()),
        ),
        (
            TOKENIZER_CONFIG.names(),
            lambda: {
                *transformers.PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
                *constants_in(transformers.PreTrainedTokenizerBase.__init__, "kwargs.pop"),
            },
        ),
    ],
    ids=["generation", "lora", "gptq", "bitsandbytes", "tokenizer"],
)
def test_documents_beside_the_config(keys: set[str], names: Any) -> None:
    assert not names() - keys


def constants_in(function: Any, call: str) -> Iterator[str]:
    """The first arguments of calls like `call` in a function's source."""
    import ast
    import textwrap

    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func) == call
        if is_call and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


@pytest.mark.parametrize("name", ["CLIPImageProcessorPil", "Qwen2VLImageProcessorPil"])
def test_image_processors_as_transformers_saves_them(name: str) -> None:
    processor = getattr(transformers, name)().to_dict()
    family = FAMILIES["qwen2_vl" if "Qwen" in name else "llava"]
    if family.name == "llava":
        processor |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    plain = family.vision(family.reference_config, {}, {})
    read = family.vision(family.reference_config, processor, {})
    assert read.mean == pytest.approx(plain.mean)
    assert read.std == pytest.approx(plain.std)
    if family.name == "qwen2_vl":
        assert read.pixels == plain.pixels


def test_every_harmless_key_has_a_reason() -> None:
    for keys in [keys for _, _, keys in CLASSES] + [GENERATION]:
        for listed in (keys.harmless, keys.elsewhere):
            assert all(reason for reason in listed.values())
        # one key, one list
        lists = [set(keys.defaults), set(keys.fixed), set(keys.harmless)]
        assert sum(map(len, lists)) == len(set().union(*lists))
    assert not HARMLESS.keys() & FIXED.keys()
    assert ACCEPTED not in HARMLESS


def test_common_fields_of_every_class() -> None:
    """What transformers' base class writes, and the parameters of generation it once wrote."""
    known = {*HARMLESS, *FIXED, "model_type", "eos_token_id", "bos_token_id"}
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    assert not base - known
    generation = set(transformers.GenerationConfig._get_default_generation_params())
    assert not generation - known


def test_the_file_itself_is_short() -> None:
    """The lists are read by people."""
    root = Path(__file__).resolve().parents[2] / "edgemed" / "models"
    for name in ("config_reader", "config_keys", "document_keys", "rope"):
        assert len((root / f"{name}.py").read_text().splitlines()) < 450
