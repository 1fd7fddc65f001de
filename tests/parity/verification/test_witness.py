"""The independent witness: right checkpoints of every family pass, wrong readings are named by
their cause, nothing is built from a checkpoint that is misread, and the result is kept.

A new family is witnessed by being there. What is wrong is put into edgemed's reading, never into
the checkpoint, so that each test stays what it is when readers get better.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXT, cli, once, refused, write_model, write_vision_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from edgemed import api, plugins
from edgemed.artifacts import store
from edgemed.documents.witness import WitnessResult
from edgemed.errors import EdgemedError
from edgemed.models.architecture import Architecture, DecoderConfig
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.weights import CanonicalWeights, Dense
from edgemed.verification.witness import child, comparison, native, reading, scores, witness
from edgemed.verification.witness.comparison import compare

PLENTY = 1 << 30
FAMILIES = plugins.names("families")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def family_model(shared: Path) -> Callable[[str], Path]:
    """A tiny checkpoint of a family, with everything that its kind of model has beside weights."""

    def make(name: str) -> Path:
        return once(shared / f"witnessed-{name}", lambda path: write_family_model(path, name))

    return make


def write_family_model(path: Path, name: str) -> None:
    write_model(path, family=name)
    weights = CanonicalWeights(open_checkpoint(path))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    config = native.native_config(path, weights.checkpoint.config, weights.family)
    if weights.vision is None or config is None:
        return
    sizes = {}
    if weights.vision.size:
        side = weights.vision.size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kinds = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    kind = kinds[config.model_type]["pil"]
    getattr(transformers, kind)(**sizes).save_pretrained(path)


def rows_of(result: WitnessResult) -> dict[str, Any]:
    return {row.what: row for row in result.rows}


def wrong_family(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    module = plugins.load("families", name)
    monkeypatch.setattr(module, "FAMILY", replace(module.FAMILY, **changes))


def wrong_decoder(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Let a family read another config.json than there is."""
    family: Architecture = plugins.load("families", name).FAMILY

    def decoder(config: Any, shapes: Any) -> DecoderConfig:
        altered = dict(config)
        change(altered)
        return family.decoder(altered, shapes)

    wrong_family(monkeypatch, name, decoder=decoder)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(
    family_model: Callable[[str], Path], name: str
) -> None:
    checkpoint = open_checkpoint(family_model(name))
    result = compare(checkpoint, PLENTY)
    assert result.passed, result.first
    rows = rows_of(result)
    weights = CanonicalWeights(checkpoint)
    config = native.native_config(checkpoint.path, checkpoint.config, weights.family)
    assert rows["token ids"].comparisons > 25
    assert rows["chat"].comparisons == 6
    if config is None:
        assert weights.family.vectors in rows["scores"].note
        assert weights.family.vectors, "say what the family is held against instead"
        assert result.line.endswith("no scores")
        return
    assert result.layers == tuple(range(weights.decoder.layers))
    probes = 2 + (weights.vision is not None)
    assert rows["scores"].comparisons == probes * len(scores.PLACES)
    assert rows["weights"].comparisons > len(weights.checkpoint.tensors)
    assert rows["stop tokens"].comparisons == 1
    if weights.vision is not None:
        assert rows["images"].comparisons >= 5


@pytest.mark.parametrize("name", FAMILIES)
def test_few_layers_where_all_do_not_fit(
    family_model: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(family_model(name))
    weights = CanonicalWeights(checkpoint)
    config = native.native_config(checkpoint.path, checkpoint.config, weights.family)
    if config is None:
        pytest.skip("transformers has no class for this family")
    deep_name = "n_layer" if "n_layer" in checkpoint.config else "num_hidden_layers"
    if "text_config" in checkpoint.config:
        text = {**checkpoint.config["text_config"], "num_hidden_layers": 4}
        path = write_model(tmp_path / "deep", family=name, text_config=text)
    else:
        path = write_model(tmp_path / "deep", family=name, **{deep_name: 4})
    deep = open_checkpoint(path)
    weights = CanonicalWeights(deep)
    vision_layers = weights.vision.layers if weights.vision else 0
    depth = scores.reduced_depth(weights.decoder, config, vision_layers)
    result = compare(deep, 4 * scores.elements(weights, depth))
    assert result.layers == (0, 3) == depth.text
    assert rows_of(result)["scores"].differ == 0, result.first
    assert rows_of(result)["weights"].differ == 0, result.first
    assert "2 of 4 layers" in result.line
    little = compare(deep, 1000)
    assert little.layers == ()
    assert "--memory" in rows_of(little)["scores"].note


def test_a_layer_keeps_its_number_at_reduced_depth(tmp_path: Path) -> None:
    # BioMedLM divides the scores of layer l by l + 1: the last of four layers, renumbered to 1,
    # would be another layer.
    path = write_model(tmp_path / "deep", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    checkpoint = open_checkpoint(path)
    weights = CanonicalWeights(checkpoint)
    config = native.native_config(path, checkpoint.config, weights.family)
    depth = native.Depth((0, 3))
    computed = scores.compute(weights, reading.recorded(checkpoint), config, depth)
    assert computed is not None
    assert scores.agree(computed.ours, computed.theirs)
    scale = weights.decoder.score_scale
    renumbered = replace(weights.decoder, score_scale=(*scale[:3], scale[1]))
    weights.decoder = renumbered
    assert not scores.agree(reading.scores(weights, computed.probes, depth, False), computed.theirs)


def test_a_period_of_layers_is_computed_whole(family_model: Callable[[str], Path]) -> None:
    weights = CanonicalWeights(open_checkpoint(family_model("qwen2")))
    config = native.native_config(
        weights.checkpoint.path, weights.checkpoint.config, weights.family
    )
    d = replace(weights.decoder, layers=12, score_scale=(1.0,) * 12)
    for types, expected in (
        (["full_attention"] * 12, (0, 11)),
        (["sliding_attention", "full_attention"] * 6, (0, 1, 11)),
        ((["sliding_attention"] * 3 + ["full_attention"]) * 3, (0, 1, 2, 3, 11)),
        (["full_attention"] * 9 + ["sliding_attention"] * 3, (0, 9, 11)),
    ):
        config.layer_types = types
        assert scores.reduced_depth(d, config, 0).text == expected


# --- what is wrong is named by its cause


def test_a_rotary_base_that_is_ignored(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_decoder(monkeypatch, "llama", lambda config: config.pop("rope_theta"))
    result = compare(open_checkpoint(family_model("llama")), PLENTY)
    assert result.first is not None
    assert result.first.startswith(
        "config.json: rope_theta 500000.0 is honoured by transformers and not by edgemed"
    )
    assert rows_of(result)["weights"].differ == 0


def test_a_rope_type_that_is_ignored(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_decoder(monkeypatch, "llama", lambda config: config.pop("rope_scaling"))
    result = compare(open_checkpoint(family_model("llama")), PLENTY)
    assert result.first is not None
    assert result.first.startswith(
        "config.json: rope_scaling type 'llama3' is honoured by transformers and not by edgemed"
    )


def test_a_key_that_only_edgemed_honours(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Architecture = plugins.load("families", "llama").FAMILY

    def decoder(config: Any, shapes: Any) -> DecoderConfig:
        d = family.decoder(config, shapes)
        scale = 3.0 if "initializer_range" in config else 1.0
        return replace(d, score_scale=tuple(scale * each for each in d.score_scale))

    wrong_family(monkeypatch, "llama", decoder=decoder)
    result = compare(open_checkpoint(family_model("llama")), PLENTY)
    assert result.first is not None
    assert result.first.startswith(
        "config.json: initializer_range 0.2 is honoured by edgemed and not by transformers"
    )


def test_an_activation_without_a_key_is_still_a_difference(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Architecture = plugins.load("families", "qwen2").FAMILY

    def decoder(config: Any, shapes: Any) -> DecoderConfig:
        return replace(family.decoder(config, shapes), activation="gelu")

    wrong_family(monkeypatch, "qwen2", decoder=decoder)
    row = rows_of(compare(open_checkpoint(family_model("qwen2")), PLENTY))["scores"]
    assert row.differ == row.comparisons
    assert "scores differ by" in row.first


def test_a_bias_that_is_dropped(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CanonicalWeights.module

    def module(self: CanonicalWeights, key: str, conv1d: bool) -> Any:
        if not key.endswith("layers.1.self_attn.k_proj"):
            return original(self, key, conv1d)
        return Dense(self.checkpoint.read(f"{key}.weight").float(), None)

    monkeypatch.setattr(CanonicalWeights, "module", module)
    result = compare(open_checkpoint(family_model("qwen2")), PLENTY)
    assert result.first == (
        "model.safetensors: tensor 'model.layers.1.self_attn.k_proj.bias' is read by transformers"
        " and not by edgemed"
    )
    assert rows_of(result)["weights"].differ == 1


def test_a_tensor_from_another_file(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoint.read

    def read(self: Checkpoint, name: str) -> Any:
        tensor = original(self, name)
        return tensor + 0.25 if name.endswith("layers.0.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    result = compare(open_checkpoint(family_model("llama")), PLENTY)
    assert result.first is not None
    assert "'model.layers.0.mlp.down_proj.weight' has other numbers in edgemed" in result.first


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (lambda plain: plain[1:], "transformers puts "),
        (lambda plain: [256, *plain], "edgemed puts '<|endoftext|>' (256) in front"),
        (lambda plain: [*plain, 256], "edgemed puts '<|endoftext|>' (256) behind"),
        (lambda plain: [*plain[:1], 7, *plain[2:]], "token 1 is "),
    ],
)
def test_tokens_that_differ(
    family_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    ids: Callable[[list[int]], list[int]],
    sentence: str,
) -> None:
    original = reading.Tokens.ids
    monkeypatch.setattr(reading.Tokens, "ids", lambda self, text: ids(original(self, text)))
    row = rows_of(compare(open_checkpoint(family_model("gpt2")), 0))["token ids"]
    assert row.differ > 20
    assert row.first.startswith("plain text: 'The patient has a fever.': ")
    assert sentence in row.first


def test_a_begin_token_that_is_not_added(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(family_model("llama"), tmp_path / "model"))
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A",
        special_tokens=[("<|endoftext|>", 256)],
    )
    tokenizer.save(str(path / "tokenizer.json"))

    def ids(self: reading.Tokens, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    monkeypatch.setattr(reading.Tokens, "ids", ids)
    result = compare(open_checkpoint(path), 0)
    assert result.first == (
        "plain text: 'The patient has a fever.': transformers puts '<|endoftext|>' (256) in front,"
        " edgemed does not"
    )


def test_chat_that_differs(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reading.Tokens.chat
    monkeypatch.setattr(
        reading.Tokens, "chat", lambda self, turns: original(self, turns).replace("<user>", "<U>")
    )
    row = rows_of(compare(open_checkpoint(family_model("gpt2")), 0))["chat"]
    assert (row.comparisons, row.differ) == (6, 3)
    assert row.first.startswith("one turn: the prompt is '<user>What is the dose")
    assert "'<U>What is" in row.first


def test_a_system_message_that_both_refuse(
    family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(family_model("gpt2"), tmp_path / "model"))
    (path / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    row = rows_of(compare(open_checkpoint(path), 0))["chat"]
    assert (row.comparisons, row.differ) == (5, 0)


def test_stop_tokens_that_are_left_out(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(family_model("llama"), tmp_path / "model"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 12, 40]}))
    monkeypatch.setattr(reading, "stop_ids", lambda weights: {256})
    row = rows_of(compare(open_checkpoint(path), 0))["stop tokens"]
    assert (row.comparisons, row.differ) == (3, 2)
    assert row.first == ("generation_config.json: transformers stops at token 12, edgemed does not")


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_are_normalised_otherwise(
    family_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    path = family_model(name)
    if not (path / "preprocessor_config.json").is_file():
        pytest.skip("a text model, or transformers has no class for it")
    path = Path(shutil.copytree(path, tmp_path / "model"))
    family: Architecture = plugins.load("families", name).FAMILY
    file = path / "preprocessor_config.json"
    content = json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    file.write_text(json.dumps(content))
    assert rows_of(compare(open_checkpoint(path), 0))["images"].differ <= 1
    read = family.vision
    assert read is not None

    def vision(config: Any, preprocessor: Any, shapes: Any) -> Any:
        return read(
            config, {key: v for key, v in preprocessor.items() if key != "image_mean"}, shapes
        )

    wrong_family(monkeypatch, name, vision=vision)
    if family.variant is not None:
        variant = family.variant
        wrong_family(
            monkeypatch, name, variant=lambda config: replace(variant(config), vision=vision)
        )
    row = rows_of(compare(open_checkpoint(path), 0))["images"]
    assert row.differ >= 5
    assert row.first.startswith(
        "preprocessor_config.json: image_mean [0.1, 0.2, 0.3] is honoured by transformers and not"
        " by edgemed"
    )


@pytest.mark.parametrize("refusing", ["native_config", "load_native"])
def test_what_transformers_refuses(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    def refuse(*args: Any) -> None:
        raise ValueError("a layer of an unknown type\nand more")

    monkeypatch.setattr(native, refusing, refuse)
    result = compare(open_checkpoint(family_model("llama")), PLENTY)
    assert result.first is not None
    assert "ValueError: a layer of an unknown type" in result.first
    assert "transformers refuses this" in result.first


def test_a_quantized_checkpoint_says_what_is_not_compared(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "needs_packages", lambda config: "gptq")
    result = compare(open_checkpoint(family_model("qwen2")), PLENTY)
    rows = rows_of(result)
    assert result.passed
    assert rows["scores"].note.startswith("transformers reads a gptq checkpoint only with packages")
    assert rows["token ids"].comparisons > 25
    assert result.line.endswith("; no scores")


# --- once per checkpoint


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that were really compared."""
    compared: list[str] = []
    original = witness.compared

    def count(
        checkpoint: Checkpoint, memory: int | None, adapters: dict[str, str]
    ) -> WitnessResult:
        compared.append(str(checkpoint.path))
        return original(checkpoint, memory, adapters)

    monkeypatch.setattr(witness, "compared", count)
    return compared


def test_the_result_is_kept(model: Path, tmp_path: Path, counted: list[str]) -> None:
    path = Path(shutil.copytree(model, tmp_path / "model"))
    cache = tmp_path / "cache"
    first = witness.witness(open_checkpoint(path), cache)
    again = witness.witness(open_checkpoint(path), cache)
    assert again.to_json() == first.to_json()
    assert len(counted) == 1
    # Another place, the same files.
    witness.witness(open_checkpoint(model), cache)
    assert len(counted) == 1
    # Any file that may be read makes it another checkpoint, also one that only transformers reads.
    (path / "added_tokens.json").write_text("{}")
    witness.witness(open_checkpoint(path), cache)
    assert len(counted) == 2
    # A damaged entry is made anew.
    for entry in cache.glob("witness-*/result.json"):
        entry.write_text("{}")
    assert witness.witness(open_checkpoint(model), cache).to_json() == first.to_json()
    assert len(counted) == 3
    assert [store.check_manifest(entry) for entry in cache.glob("witness-*")].count([]) == 1
    assert not [entry for entry in cache.iterdir() if not entry.name.startswith("witness-")]


def test_other_code_asks_anew(
    model: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(model)
    witness.witness(checkpoint, tmp_path)
    monkeypatch.setattr(witness, "code_digest", lambda: "0" * 64)
    witness.witness(checkpoint, tmp_path)
    assert len(counted) == 2


def test_a_cache_that_cannot_be_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    result = witness.witness(open_checkpoint(model), tmp_path / "file" / "cache")
    assert result.passed
    monkeypatch.delenv("EDGEMED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert witness.user_cache() == tmp_path / "xdg" / "edgemed"


@pytest.mark.process
def test_a_large_model_is_read_in_a_process_of_its_own(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = witness.compared(open_checkpoint(model), PLENTY, {})
    monkeypatch.setattr(witness, "SMALL", 0)
    assert witness.compared(open_checkpoint(model), PLENTY, {}).to_json() == here.to_json()


def test_a_refusal_of_that_process_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(model, tmp_path / "model"))
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(SystemExit):
        child.main([str(path), str(PLENTY)])
    stderr = capsys.readouterr().err
    process = subprocess.CompletedProcess([], 1, "", f"a warning\n{stderr}")
    monkeypatch.setattr(subprocess, "run", lambda *args, **named: process)
    monkeypatch.setattr(witness, "SMALL", 0)
    with pytest.raises(EdgemedError, match=r"tokenizer\.json") as refusal:
        witness.compared(open_checkpoint(path), PLENTY, {})
    assert refusal.value.fix == "Copy it again from the base model"


# --- nothing is built from what is misread


def test_an_export_is_refused_and_names_the_cause(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(model, tmp_path / "model"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 12]}))
    monkeypatch.setattr(reading, "stop_ids", lambda weights: {256})
    out = tmp_path / "engine"
    done = cli("export", path, "--target", "onnx", "--out", out, "--prompts", "none")
    line = refused(
        done,
        path,
        "is read otherwise by transformers",
        "generation_config.json: transformers stops at token 12, edgemed does not",
        "edgemed witness",
    )
    assert "(1 of " in line
    assert not out.exists()
    with pytest.raises(EdgemedError, match="stops at token 12"):
        api.export(str(path), "onnx", out, prompts=None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": str(path), "engines": [{"onnx": {"precision": "fp32"}}]})
    )
    refused(cli("run", recipe, "--work", tmp_path / "work"), "stops at token 12")
    assert not (tmp_path / "work" / "report.json").exists()


def test_the_result_travels_with_the_engine(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    done = cli("export", model, "--target", "onnx", "--out", out, "--set", "precision=fp32")
    assert done.returncode == 0, done.stderr
    content = store.open_manifest(out).notes["witness"]
    result = WitnessResult.from_json(content)
    assert result.passed
    assert result.comparisons > 90
    assert result.line in done.stdout
    verified = cli("verify", out, "--json")
    assert json.loads(verified.stdout)["witness"] == result.line
    page = cli("report", out, "--out", tmp_path / "page.html")
    assert page.returncode == 0, page.stderr
    assert result.line in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["witness", "verify"])
def test_a_person_asks(model: Path, verb: str) -> None:
    done = cli(verb, model)
    assert done.returncode == 0, done.stderr
    assert f"witness: transformers {transformers.__version__}, " in done.stdout
    assert ", 0 differ" in done.stdout
    for what in ("weights", "scores", "token ids", "chat", "stop tokens"):
        assert what in done.stdout
    document = json.loads(cli(verb, model, "--json").stdout)
    assert document["passed"] is True
    assert document["version"] == transformers.__version__


def test_a_difference_is_an_exit_code(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "stop_ids", lambda weights: set())
    monkeypatch.setenv("EDGEMED_CACHE", str(tmp_path))
    done = cli("witness", model)
    assert done.returncode == 1
    assert "transformers stops at token 256" in done.stdout
    refused(cli("witness", tmp_path / "nothing"), "does not exist")
    refused(cli("witness", model, "--memory", "4 apples"), "--memory")


def test_a_vision_model_with_its_processor(tmp_path: Path) -> None:
    path = write_vision_model(tmp_path / "model", max_position_embeddings=CONTEXT)
    result = compare(open_checkpoint(path), PLENTY)
    assert rows_of(result)["scores"].comparisons == 3 * len(scores.PLACES)
    assert result.passed, result.first
    assert any("16 bits" in exception for exception in result.exceptions)


def test_half_of_what_is_free_at_most() -> None:
    assert 0 < comparison.usual_memory() <= comparison.MEMORY
