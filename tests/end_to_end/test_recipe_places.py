"""A recipe finds its files: beside itself, in the current directory, among the shipped ones; and
what an installed package lacks is said.
"""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, cli, refused

from edgemed import plugins
from edgemed.errors import EdgemedError, MissingPackages, install_command, missing
from edgemed.pipeline.recipe import read_recipe

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def test_a_copied_recipe_finds_its_model(tmp_path: Path) -> None:
    copied = shutil.copy(QUICKSTART, tmp_path / "mine.yaml")
    recipe = read_recipe(copied)
    original = read_recipe(QUICKSTART)
    assert Path(recipe.model).samefile(original.model)
    for ours, theirs in zip(recipe.steps, original.steps, strict=True):
        for key in ("adapter", "calibration"):
            assert getattr(ours.params, key, None) == getattr(theirs.params, key, None) or Path(
                getattr(ours.params, key)
            ).samefile(getattr(theirs.params, key))
    # What lies beside the copy comes first.
    (tmp_path / "quickstart" / "model").mkdir(parents=True)
    assert read_recipe(copied).model == str(tmp_path / "quickstart" / "model")


def test_files_of_tasks_and_lists_lie_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt", "rows.jsonl"):
        (tmp_path / name).write_text("")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: quickstart/model\nsteps:\n"
        "  - quantize: {method: gptq, calibration: 'a.jsonl, pubmedqa-abstracts,b.txt'}\n"
        "engines: [onnx]\neval: {tasks: ['section:rows.jsonl', section]}\n"
    )
    parsed = read_recipe(recipe)
    assert parsed.eval.tasks == (f"section:{tmp_path / 'rows.jsonl'}", "section")
    assert parsed.steps[0].params.calibration == (
        f"{tmp_path / 'a.jsonl'},pubmedqa-abstracts,{tmp_path / 'b.txt'}"
    )


def test_an_installed_package_says_where_the_models_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "recipes"
    installed.mkdir()
    shutil.copy(QUICKSTART, installed)
    monkeypatch.setattr(plugins, "shared", lambda folder: tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    line = refused(cli("run", "quickstart"), "quickstart/model is not there", "source tree")
    assert "recipes/quickstart.yaml of a clone" in line


def test_hub_ids_stay_as_they_are(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: stanford-crfm/BioMedLM\nengines: [onnx]\n")
    assert read_recipe(recipe).model == "stanford-crfm/BioMedLM"


# --- what is not installed


def test_the_hint_names_the_clone_or_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    from edgemed import errors

    assert install_command("build", "onnx") == f"pip install -e '{ROOT}[build,onnx]'"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "edgemed" / "errors.py"))
    notes = {"direct_url.json": '{"url": "file:///wheels/edgemed-0.1.0-py3-none-any.whl"}'}
    monkeypatch.setattr(
        metadata, "distribution", lambda name: type("D", (), {"read_text": notes.get})()
    )
    assert install_command("vision") == (
        "pip install '/wheels/edgemed-0.1.0-py3-none-any.whl[vision]'"
    )
    notes.clear()
    assert install_command("vision") == (
        "pip install '/path/to/edgemed-VERSION-py3-none-any.whl[vision]'"
    )


def test_every_missing_extra_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed.cli import extras

    monkeypatch.setattr(extras, "is_installed", lambda module: False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: quickstart-vlm/model\nengines: [onnx, llamacpp]\n")
    assert set(extras.absent("run", {"recipe": str(recipe)}).values()) == {
        *("build", "bom", "onnx", "llamacpp", "vision")
    }
    export = extras.absent("export", {"target": "llamacpp"})
    assert set(export.values()) == {"build", "bom", "llamacpp"}
    (tmp_path / "engine.json").write_text('{"target": "onnx", "vision": {"patch": 14}}')
    assert set(extras.absent("bench", {"engine": tmp_path}).values()) == {"onnx", "vision"}
    assert extras.absent("bench", {"engine": tmp_path / "nowhere"}) == {}
    evaluated = extras.absent("eval", {"engine": tmp_path / "x", "source": "model"})
    assert set(evaluated.values()) == {"build"}


def test_an_error_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one = missing("torch", "build")
    assert isinstance(one, EdgemedError)
    assert "needs the package 'torch', which is not installed" in str(one)
    many = one.joined({"onnxruntime": "onnx", "PIL": "vision", "peft": "build"})
    assert isinstance(many, MissingPackages)
    assert "packages 'torch', 'onnxruntime', 'PIL', 'peft', which are not" in str(many)
    assert "Install edgemed[build,onnx,vision]: pip install -e" in str(many)
    assert "[build,onnx,vision]'" in str(many)
    from edgemed.cli import extras

    def absent(*arguments: object) -> None:
        raise missing("onnxruntime", "onnx")

    monkeypatch.setattr(extras, "is_installed", lambda module: module != "torch")
    monkeypatch.setattr("edgemed.planning.inspect.inspect", absent)
    refused(cli("inspect", "random:biomedlm"), "'onnxruntime'")
