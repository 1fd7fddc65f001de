"""What every plug-in must be, checked by walking the folders: a new family, step, target, task,
device, text set or recipe is tested by being there.

Nothing here names one of them; what is expected comes from the values they export.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from conftest import CONTEXT, ROOT, TINY, tiny_config, tokens, write_model

torch = pytest.importorskip("torch")

from edgemed import params as strict
from edgemed import plugins
from edgemed.data.text_sets import card_names, read_card, texts
from edgemed.engines.engine import Engine, export
from edgemed.errors import EdgemedError
from edgemed.evaluation.task import Task, questions, task_description
from edgemed.inference.decoding import Sampling, generate
from edgemed.models.architecture import Architecture, DecoderConfig, all_families
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import TorchSession, logits
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import PATH_KEYS, read_recipe
from edgemed.pipeline.shipped_recipes import PACKAGED

FAMILIES, STEPS, TARGETS, TASKS = (
    plugins.names(kind) for kind in ("families", "steps", "targets", "tasks")
)
# Families transformers has no model of are compared with references of their own, in files of their
# own.
KNOWN = [name for name in FAMILIES if plugins.load("families", name).FAMILY.auto_classes]
IDS = tokens(40)


def filled(value: object) -> None:
    for field in dataclasses.fields(value):
        assert field.default is None or getattr(value, field.name) is not None, (
            f"{field.name} is missing"
        )


# --- families


@pytest.mark.parametrize("name", FAMILIES)
def test_family_value(name: str) -> None:
    family = plugins.load("families", name).FAMILY
    assert isinstance(family, Architecture)
    assert family.name == name
    assert family.model_types
    filled(family)
    d = family.decoder(family.reference_config, {})
    assert isinstance(d, DecoderConfig)
    assert len(d.score_scale) == d.layers
    assert d.heads % d.kv_heads == 0
    parts = family.parts(d)
    expected = {"embed", "final_norm", "lm_head"} | {
        f"layers.{n}.{part}" for n in range(d.layers) for part in ("attn_norm", *d.matrices(n))
    }
    assert expected <= set(parts)
    assert all(part.kind in ("matrix", "router", "table", "norm") for part in parts.values())
    assert parts["layers.0.qkv"].shape == (d.q_size + 2 * d.kv_size, d.hidden)
    assert parts[f"layers.0.{d.matrices(0)[-1]}"].shape == (d.hidden, d.ffn)
    folded = family.decoder(family.folded(family.reference_config), {})
    assert folded.score_scale == (d.head_dim**-0.5,) * d.layers


@pytest.mark.parametrize("name", FAMILIES)
def test_no_two_families_claim_one_architecture(name: str) -> None:
    claimed = [t for family in all_families().values() for t in family.model_types]
    assert len(claimed) == len(set(claimed))


def transformers_model(name: str, auto: str, path: Path, dtype: str = "float32", **changes: object):
    """A tiny random model of the family, made and saved by transformers itself; weights far enough
    from zero to tell errors.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**tiny_config(name, **changes))
    config.pad_token_id = None
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    # Read anew: .to() rounds what is no weight too, such as rotary frequencies.
    return getattr(transformers, auto).from_pretrained(path, dtype=torch.float32).eval()


def compare(path: Path, model, head: bool = False) -> None:
    with torch.inference_mode():
        right = model(input_ids=torch.tensor([IDS])).logits[0]
    weights = CanonicalWeights(open_checkpoint(path))
    found = logits(weights, torch.tensor([IDS]))[0]
    found = found[-1] if head else found
    assert (found - right.reshape(found.shape)).abs().max() < 1e-4
    used = {
        tensor
        for name, keys in weights.keys.items()
        for key in keys
        for tensor in (weights.parts[name].weight(key), f"{key}.bias")
    }
    unused = [
        key
        for key in weights.checkpoint.tensors
        if key not in used and not key.endswith(weights.family.ignored) and key != "lm_head.weight"
    ]
    assert not unused, f"stored and never read: {unused}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", KNOWN)
def test_family_logits_equal_transformers(name: str, tmp_path: Path, dtype: str) -> None:
    model = transformers_model(name, all_families()[name].auto_classes["lm"], tmp_path, dtype)
    compare(tmp_path, model)


@pytest.mark.parametrize(
    "name",
    [name for name in FAMILIES if "classes" in plugins.load("families", name).FAMILY.auto_classes],
)
def test_family_classes_head_equals_transformers(name: str, tmp_path: Path) -> None:
    model = transformers_model(
        name, all_families()[name].auto_classes["classes"], tmp_path, num_labels=3
    )
    weights = CanonicalWeights(open_checkpoint(tmp_path))
    assert (weights.decoder.head, weights.decoder.head_size) == ("classes", 3)
    compare(tmp_path, model, head=True)


@pytest.mark.parametrize("name", KNOWN)
def test_family_key_prefixes_and_file_kinds(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    family = all_families()[name]
    plain = tmp_path / "plain"
    model = transformers_model(name, family.auto_classes["lm"], plain)
    stored = load_file(plain / "model.safetensors")
    bare = {
        key.removeprefix(next(p for p in family.prefixes if key.startswith(p))): tensor
        for key, tensor in stored.items()
    }
    config = (plain / "config.json").read_text()
    for number, prefix in enumerate(family.prefixes):
        tensors = {f"{prefix}{key}": tensor.contiguous() for key, tensor in bare.items()}
        for kind in ("single", "sharded", "pickle", "sharded-pickle"):
            out = tmp_path / f"{kind}-{number}"
            out.mkdir()
            (out / "config.json").write_text(config)
            half = len(tensors) // 2
            halves = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
            suffix, stem, save = (
                ("bin", "pytorch_model", torch.save)
                if "pickle" in kind
                else ("safetensors", "model", save_file)
            )
            files = (
                {f"{stem}.{suffix}": tensors}
                if not kind.startswith("sharded")
                else {f"{stem}-{i}-of-2.{suffix}": part for i, part in enumerate(halves, 1)}
            )
            for file, part in files.items():
                save(part, out / file)
            if kind.startswith("sharded"):
                index = {"weight_map": {key: file for file, part in files.items() for key in part}}
                (out / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
            compare(out, model)


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_no_score(name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", family=name)
    plain, folded = (
        logits(CanonicalWeights(open_checkpoint(path), fold=fold), torch.tensor([IDS]))
        for fold in (False, True)
    )
    assert (plain - folded).abs().max() < 1e-4
    d = CanonicalWeights(open_checkpoint(path), fold=True).decoder
    assert set(d.score_scale) == {d.head_dim**-0.5}


# --- steps


@pytest.mark.parametrize("name", STEPS)
def test_step_module(name: str) -> None:
    module = plugins.load("steps", name)
    check_params(module)
    assert list(inspect.signature(module.inputs).parameters) == ["params"]
    assert list(inspect.signature(module.run).parameters) == ["checkpoint", "out", "params"]


def check_params(module: ModuleType) -> None:
    assert dataclasses.is_dataclass(module.Params)
    assert module.Params.__dataclass_params__.frozen
    assert module.Params.__doc__, "Params says what its fields mean"
    assert not module.Params.__doc__.startswith("Params("), "Params says what its fields mean"
    texts = {parameter.name: parameter.doc for parameter in strict.described(module.Params)}
    for field in dataclasses.fields(module.Params):
        assert (
            len(texts[field.name]) > 10
            or field.name in module.Params.__doc__
            or field.name in (module.__doc__ or "")
            or field.name in ("method", "bits")
        ), f"{field.name} is not explained"
    with pytest.raises(EdgemedError, match="unknown key 'nonsense'"):
        strict.build(module.Params, {"nonsense": 1}, "here")


# --- targets


@pytest.mark.parametrize("name", TARGETS)
def test_target_module(name: str) -> None:
    module = plugins.load("targets", name)
    check_params(module)
    assert isinstance(module.FP32_TOLERANCE, dict)
    assert module.FP32_TOLERANCE
    assert all(0 < error < 0.1 for error in module.FP32_TOLERANCE.values())
    assert isinstance(module.label(module.Params()), str)
    assert isinstance(module.self_check(), str)
    runtime, extra = module.RUNTIME
    assert runtime
    assert extra in (ROOT / "pyproject.toml").read_text()
    for function, parameters in (
        ("inputs", ["params"]),
        ("supports", ["weights", "params"]),
        ("build", ["weights", "out", "params"]),
        ("open", ["engine", "threads"]),
        ("open_vision", ["engine", "threads"]),
        ("vision_tolerance", ["engine"]),
        ("engine_bytes", ["weights", "precision"]),
        ("inspected_sizes", ["weights"]),
        ("unsuitable", ["device"]),
        ("runs_on_cpu", ["weights"]),
        ("build_bytes", ["weights", "size"]),
        ("tower_elsewhere", ["device"]),
        ("plan_notes", ["device"]),
        ("recipe_params", ["device"]),
        ("quantize_group", ["bits"]),
    ):
        assert list(inspect.signature(getattr(module, function)).parameters) == parameters


@pytest.mark.parametrize("name", TARGETS)
def test_target_has_what_the_page_says(name: str) -> None:
    module = plugins.load("targets", name)
    page = (ROOT / "docs" / "add-a-target.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)(?:\(([\w, ]*)\))?` \|", page, re.MULTILINE)
    assert len(listed) > 20
    for fact, parameters in listed:
        value = getattr(module, fact)
        if callable(value) and parameters:
            assert list(inspect.signature(value).parameters) == parameters.split(", "), fact
    assert {choice.target for choice in module.CHOICES} <= {name}
    known = {parameter.name for parameter in strict.described(module.Params)}
    tower = next(each for each in strict.described(module.Params) if each.name == "tower")
    assert next(iter(module.PLANNED_TOWERS)) == tower.default
    for choice in module.CHOICES:
        assert set(choice.params) <= known
        assert choice.kv
    extras = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in extras for extra in module.PACKAGES.values())
    assert set(module.PACKAGES_INSTEAD) <= set(module.PACKAGES)


@pytest.mark.parametrize("name", TARGETS)
def test_every_session_carries_vision(name: str) -> None:
    """Whoever writes a session inherits how it carries its vision encoder."""
    from edgemed.inference.session import CarriesVision

    module = plugins.load("targets", name)
    hints = inspect.signature(module.open).return_annotation
    classes = [getattr(module, word, None) for word in re.findall(r"\w+", hints)]
    for session in [one for one in classes if isinstance(one, type)]:
        assert issubclass(session, CarriesVision)


@pytest.mark.parametrize("name", TARGETS)
def test_target_inputs_are_the_files_its_params_name(name: str, tmp_path: Path) -> None:
    module = plugins.load("targets", name)
    file = tmp_path / "text.jsonl"
    plain = module.inputs(module.Params())
    assert isinstance(plain, dict)
    for field in {field.name for field in dataclasses.fields(module.Params)} & set(PATH_KEYS):
        named = dataclasses.replace(module.Params(), **{field: str(file)})
        found = []
        file.unlink(missing_ok=True)
        with pytest.raises(EdgemedError, match="does not exist"):
            module.inputs(named)
        for text in ("one", "another"):
            file.write_text(json.dumps({"id": 1, "text": text}))
            found.append(module.inputs(named))
        assert found[0] != found[1]
        assert hashlib.sha256(file.read_bytes()).hexdigest() in found[1].values()
        assert found[1].keys() > plain.keys()


def exact_params(name: str, model: Path, folder: Path):
    """The target's Params whose engine's precision is one it calls exact: found by trying the
    values of its fields.
    """
    import typing

    module = plugins.load("targets", name)
    for field, hint in typing.get_type_hints(module.Params).items():
        for choice in (
            c
            for arg in (hint, *typing.get_args(hint))
            if typing.get_origin(arg) is typing.Literal
            for c in typing.get_args(arg)
        ):
            if str(choice).upper() in {precision.upper() for precision in module.FP32_TOLERANCE}:
                return module.Params(**{field: choice})
    raise AssertionError(f"{name}: no parameter gives one of {list(module.FP32_TOLERANCE)}")


@pytest.fixture(
    scope="module",
    params=[(f, t) for f in FAMILIES for t in TARGETS],
    ids=lambda pair: "-".join(pair),
)
def exact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, np.ndarray, list[int]]:
    family, target = request.param
    folder = tmp_path_factory.mktemp("exact")
    path = write_model(folder / "model", family=family)
    if reason := plugins.load("targets", target).supports(
        CanonicalWeights(open_checkpoint(path)), exact_params(target, path, folder)
    ):
        pytest.skip(f"{target} does not take {family}: {reason}")
    engine = export(
        open_checkpoint(path), target, exact_params(target, path, folder), folder / "engine"
    )
    ids = tokens(CONTEXT, seed=2)
    return (
        engine,
        logits(CanonicalWeights(open_checkpoint(path)), torch.tensor([ids]))[0].numpy(),
        ids,
    )


def test_exact_engine_speaks_the_session_protocol(
    exact: tuple[Engine, np.ndarray, list[int]],
) -> None:
    engine, right, ids = exact
    bound = plugins.load("targets", engine.target).FP32_TOLERANCE[engine.precision]
    session = engine.open(1)
    try:
        assert (session.head, session.width, session.context, session.position) == (
            "lm",
            TINY["vocab_size"],
            CONTEXT,
            0,
        )
        every = session.prefill(ids[:50], every=True)
        assert every.dtype == np.float32
        assert every.shape == (50, TINY["vocab_size"])
        assert np.abs(every - right[:50]).max() < bound
        one = session.step(ids[50])
        assert one.shape == (TINY["vocab_size"],)
        assert np.abs(one - right[50]).max() < bound
        assert session.position == 51
        last = session.prefill(ids[51:60])
        assert last.shape == (1, TINY["vocab_size"])
        assert np.abs(last[0] - right[59]).max() < bound
        session.rewind(20)
        assert np.abs(session.prefill(ids[20:45], every=True) - right[20:45]).max() < bound
        session.rewind(0)
        session.prefill(ids)
        for append in (lambda: session.step(0), lambda: session.prefill([0])):
            with pytest.raises(EdgemedError, match="longer than the context"):
                append()
        with pytest.raises(EdgemedError, match="the prompt is empty"):
            session.prefill([])
    finally:
        session.close()


def test_exact_engine_gives_every_greedy_token(exact: tuple[Engine, np.ndarray, list[int]]) -> None:
    engine, _, ids = exact
    source = TorchSession(CanonicalWeights(open_checkpoint(engine.path.parent / "model")))
    session = engine.open(1)
    try:
        for start in range(0, 60, 20):
            source.rewind(0)
            session.rewind(0)
            prompt = ids[start : start + 20]
            sampling = Sampling(max_tokens=32)
            assert list(generate(session, prompt, sampling)) == list(
                generate(source, prompt, sampling)
            )
    finally:
        session.close()


def test_engine_directory_is_self_contained(exact: tuple[Engine, np.ndarray, list[int]]) -> None:
    engine, _, _ = exact
    facts = json.loads((engine.path / "engine.json").read_text())
    assert facts["bytes_per_token"] > 0
    assert facts["vocab"] == TINY["vocab_size"]
    assert facts["random_weights"] is False
    assert engine.tokenizer().decode(engine.tokenizer().encode("50 mg é").ids) == "50 mg é"
    said = (engine.path / "engine.json").read_text() + (engine.path / "manifest.json").read_text()
    assert str(engine.path.parent) not in said, (
        "an engine travels: it must not remember where it was made"
    )


# --- tasks, devices, text sets, recipes


@pytest.mark.parametrize("name", TASKS)
def test_task(name: str) -> None:
    task = plugins.load("tasks", name).TASK
    assert isinstance(task, Task)
    assert task.name == name
    filled(task)
    assert all(
        (
            task.source,
            task.licence,
            task.split,
            task.metric,
            task.prompt,
            task.wording,
            task.languages,
        )
    )
    asked = questions(name)
    assert len(questions(name, 3).examples) == 3
    assert asked.examples[:3] == questions(name, 3).examples
    assert len({example.gold for example in asked.examples}) > 1
    for example in (*asked.examples, *asked.shots):
        prompt = task.render(example)
        before = task_description(task, example)
        assert len(prompt.options) == len(example.options)
        assert all(option.startswith(" ") and option.strip() for option in prompt.options)
        assert not prompt.context.endswith((" ", "\n"))
        assert "{" not in before
        assert before == before.lstrip()
        listed = [
            f"\n{letter}{')' if task.images else '.'} {option}" in prompt.context
            for letter, option in zip("ABCDEFGH", example.options, strict=False)
        ]
        assert all(listed) if task.lettered else not any(listed)


@pytest.mark.parametrize("name", TASKS)
def test_task_sample_and_card(name: str) -> None:
    task = plugins.load("tasks", name).TASK
    folder = plugins.ROOT / "tasks" / "samples"
    card = yaml.safe_load(
        (folder / f"{Path(task.sample).stem}.card.yaml").read_text(encoding="utf-8")
    )
    asked = questions(name)
    described = [(card, task.sample)] + [
        (card[kind], file)
        for kind, file in (("shots", task.shots), ("images", task.images))
        if file
    ]
    for entry, file in described:
        assert entry["sha256"] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert entry.get("file", file) == file
    assert card["n"] == (
        len(asked.examples)
        if not task.parts
        else len((folder / task.sample).read_text(encoding="utf-8").splitlines())
    )
    assert not task.shots or (card["shots"]["n"], bool(card["shots"]["from"])) == (
        len(asked.shots),
        True,
    )
    assert card["licence"] == task.licence
    assert card["contains_phi"] is False
    assert card["source"]
    assert any(
        name in line
        for line in (ROOT / "LICENSES" / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    )
    if card.get("synthetic"):
        assert task.place
        assert "synthetic" in task.split
        assert "whole_set" not in card
        assert {
            language for language in task.languages if questions(f"{name}/{language}").examples
        } == set(task.languages)
        return
    for part in card["whole_set"] if isinstance(card["whole_set"], list) else [card["whole_set"]]:
        assert part["path"]
        assert len(part["sha256"]) == 64
        assert part["n"] > 0
    for language in task.languages if len(task.languages) > 1 else ():
        spoken = questions(f"{name}/{language}")
        assert len(spoken.examples) >= 30
        assert len(spoken.shots) >= 5
        assert {e.groups["language"] for e in (*spoken.examples, *spoken.shots)} == {language}


@pytest.mark.parametrize(
    "name", [name for name in TASKS if plugins.load("tasks", name).TASK.images]
)
def test_images_of_a_task_open(name: str) -> None:
    pytest.importorskip("PIL")
    for spec in (name, *(f"{name}/{part}" for part in plugins.load("tasks", name).TASK.parts)):
        asked = questions(spec)
        assert asked.has_vision
        assert all(example.images for example in asked.examples)
        for example in (asked.examples[0], asked.examples[-1]):
            assert all(
                picture.mode == "RGB" and max(picture.size) <= 224
                for picture in asked.pictures(example)
            )


@pytest.mark.parametrize("name", [name for name in TASKS if plugins.load("tasks", name).TASK.shots])
def test_no_solved_example_is_asked(name: str) -> None:
    task = plugins.load("tasks", name).TASK
    folder = plugins.ROOT / "tasks" / "samples"
    rows, solved = (
        [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]
        for file in (task.sample, task.shots)
    )

    def document(identifier: str) -> str:
        """One document asked in parts (id#2) or languages (id/es) counts as one."""
        stem, _, last = identifier.rpartition("/")
        return stem if last in task.languages else identifier.split("#")[0]

    one, other = ({document(row["id"]) for row in part} for part in (rows, solved))
    assert one
    assert other
    assert not one & other
    words = [
        {
            " ".join(
                task.example({"language": task.languages[0], **row}).question.split()
            ).casefold()
            for row in part
        }
        for part in (rows, solved)
    ]
    assert not words[0] & words[1]


@pytest.mark.parametrize("name", plugins.names("devices"))
def test_device(name: str) -> None:
    from edgemed.hardware.device import SOURCE_OF, read_device

    device = read_device(name)
    assert device.name == name
    assert device.title
    for field, part in SOURCE_OF.items():
        assert not getattr(device, field) or device.source.get(part), (
            f"{name}: {field} names no source ({part})"
        )
    assert set(device.source) <= set(SOURCE_OF.values())


@pytest.mark.parametrize("name", card_names())
def test_text_set(name: str) -> None:
    card = read_card(name)
    assert card.name == name
    assert card.metadata["contains_phi"] is False
    assert card.metadata["licence"]
    assert card.metadata["source"]
    licences = "\n".join(file.name for file in (ROOT / "LICENSES").iterdir())
    assert (
        card.metadata["licence"].split()[0] in licences
        or card.metadata["licence"] in (ROOT / "LICENSES" / "ATTRIBUTION.md").read_text()
    )
    for split, file in card.files.items():
        assert len(card.digest(split)) == 64
        assert (
            len(zipfile.ZipFile(file).namelist() if file.suffix == ".zip" else texts(name, split))
            == card.metadata["files"][split]["n"]
        )
    assert not set(texts(name, "calibration")) & set(texts(name, "heldout")), (
        "held-out texts must not be calibrated on"
    )


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.stem)
def test_recipe(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a recipe downloads need not be there to read the recipe.
    for name in PACKAGED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(file)
    assert recipe.engines
    assert recipe.title
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 20
    assert lines[0].startswith("# ")
    assert f"edgemed run recipes/{file.name}" in lines[0]
    assert read_recipe(file.stem) == recipe, "a shipped recipe is found by its name alone"
