"""The device needs no torch: engines made here run, are measured, evaluated and verified in an
environment that has neither torch nor transformers.

`make test` makes that environment (.venv-device) from the package as a user installs it, so a file
missing from the package shows too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, cli

PYTHON = ROOT / ".venv-device" / "bin" / "python"
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-device: make test makes it"),
]
TARGETS = {
    "onnx": ["--set", "precision=int8", "--set", "group=32"],
    "llamacpp": ["--set", "type=q8_0"],
}


def device(*arguments: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return cli(*arguments, python=PYTHON, cwd=cwd, env={"PYTHONPATH": ""}, **options)


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines made in one directory and carried to another; the model they came from is not
    there.
    """
    made = tmp_path_factory.mktemp("build")
    carried = tmp_path_factory.mktemp("device")
    for target, options in TARGETS.items():
        done = cli("export", model, "--target", target, "--out", made / target, *options)
        assert done.returncode == 0, done.stderr
        shutil.move(made / target, carried / target)
    return {target: carried / target for target in TARGETS}


def test_environment_has_no_torch_and_not_this_source_tree(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, json, edgemed; print(json.dumps([edgemed.__file__, *[n for n"
        " in ('torch', 'transformers', 'peft', 'onnx', 'safetensors', 'gguf') if u.find_spec(n)]]))"
    )
    done = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    file, *found = json.loads(done.stdout)
    assert not found
    assert Path(file).is_relative_to(ROOT / ".venv-device")


@pytest.mark.parametrize("target", TARGETS)
def test_engine_runs_there(engines: dict[str, Path], target: str, tmp_path: Path) -> None:
    engine = engines[target]
    verified = device("verify", engine, "--min-top1", 0, "--max-kl", 9, "--json", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    result = json.loads(verified.stdout)
    assert result["top1"] > 0.8
    assert result["greedy_tokens"] > 0
    here = json.loads(cli("verify", engine, "--min-top1", 0, "--max-kl", 9, "--json").stdout)
    assert {k: result[k] for k in ("top1", "greedy_same")} == {
        k: here[k] for k in ("top1", "greedy_same")
    }, "built and carried engines must answer alike"

    said = device("generate", engine, "--prompt", "The patient", "--max-tokens", 12, cwd=tmp_path)
    assert said.returncode == 0
    assert not said.stderr
    assert (
        said.stdout == cli("generate", engine, "--prompt", "The patient", "--max-tokens", 12).stdout
    )

    talk = device("chat", engine, "--max-tokens", 6, cwd=tmp_path, stdin="What is anemia?\n\n")
    assert talk.returncode == 0
    assert talk.stdout.startswith("> ")
    assert not talk.stderr

    measured = device(
        "bench", engine, "--runs", 1, "--generate", 4, "--prompt", 8, "--json", cwd=tmp_path
    )
    assert measured.returncode == 0, measured.stderr
    assert {r["name"]: r["value"] for r in json.loads(measured.stdout)}[
        "decode_tokens_per_second"
    ] > 0

    scored = device("eval", engine, "--task", "section", "--limit", 5, "--json", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["engine"][0]["n"] == 5

    intact = device("verify", "--manifest", engine, "--json", cwd=tmp_path)
    assert json.loads(intact.stdout)["intact"] is True


def test_doctor_and_list(tmp_path: Path) -> None:
    found = device("doctor", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    findings = {row["name"]: row for row in json.loads(found.stdout)}
    assert findings["torch"]["state"] == "missing"
    assert "edgemed[build]" in findings["torch"]["fix"]
    assert findings["onnxruntime"]["state"] == "ok"
    listed = json.loads(device("list", "--json", cwd=tmp_path).stdout)
    assert listed["recipes"], "data folders are part of the package"
    assert listed["text sets"], "data folders are part of the package"
    assert set(TARGETS) <= set(listed["targets"]), "data folders are part of the package"


def test_building_there_says_what_to_install(tmp_path: Path, model: Path) -> None:
    done = device(
        "export",
        model,
        "--target",
        "onnx",
        "--prompts",
        "none",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Install edgemed[build,bom]: pip install" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_signature_is_checked_there(engines: dict[str, Path], tmp_path: Path) -> None:
    engine = engines["onnx"]
    keys = tmp_path / "keys"
    for arguments in (["keygen", "--out", keys], ["sign", engine, "--key", keys / "private.pem"]):
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
    command = [
        "verify",
        engine,
        "--key",
        keys / "public.pem",
        "--min-top1",
        0,
        "--max-kl",
        9,
        "--json",
    ]
    done = device(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["signed by"].startswith("sha256:"), done.stderr
    text = (engine / "README.md").read_text(encoding="utf-8")
    (engine / "README.md").write_text(text + "x", encoding="utf-8")
    done = device(*command, cwd=tmp_path)
    (engine / "README.md").write_text(text, encoding="utf-8")
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"] == ["README.md was altered after signing"]
