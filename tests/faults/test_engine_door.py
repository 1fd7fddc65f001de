"""The one door through which engines are opened: what was altered, what is no engine, and what
leads out of its directory is refused in one line by every verb, `generate` and `chat` included.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, refused

from edgemed.artifacts import store
from edgemed.documents.document import plain

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def engine_made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "onnx"
    done = cli("export", model, "--out", out, "--set", "precision=fp32")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "file",
    [
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
        "reference.npz",
        "engine.json",
    ],
)
def test_generate_refuses_an_altered_engine(engine_made: Path, tmp_path: Path, file: str) -> None:
    altered = Path(shutil.copytree(engine_made, tmp_path / "altered"))
    data = bytearray((altered / file).read_bytes())
    data[len(data) // 2] ^= 1
    (altered / file).write_bytes(data)
    refused(cli("generate", altered, "--prompt", "x"), f"{file} was altered")
    refused(cli("generate", altered, "--prompt", "x", "--check"), f"{file} was altered")
    refused(cli("chat", altered, stdin="x\n"), f"{file} was altered")


def sealed(engine: Path, **changes: object) -> Path:
    """An engine whose engine.json says something else, with a manifest that agrees."""
    facts = json.loads((engine / "engine.json").read_text())
    store.write_json(engine / "engine.json", {**facts, **changes})
    manifest = store.read_manifest(engine)
    files = plain(store.files_of(engine))
    store.write_json(engine / "manifest.json", {**manifest, "files": files})
    return engine


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"context": "many"}, ["context", "'many' is not a whole number"]),
        ({"context": 10**12}, ["context", "out of range"]),
        ({"context": -1}, ["context", "out of range"]),
        ({"head": "tail"}, ["head", "'tail' is not a known value"]),
        ({"target": "../x"}, ["unknown target '../x'"]),
        ({"params": {"presision": "int4"}}, ["params", "Did you mean 'precision'"]),
        ({"params": []}, ["params", "is not a mapping"]),
        ({"adapters": ["../x"]}, ["adapters", "'../x' is no name"]),
        ({"default": "x"}, ["carries no adapter 'x'"]),
        ({"vision": {"width": 1}}, ["vision"]),
        ({"path": "/tmp"}, ["unknown key 'path'"]),
        ({"contex": 5}, ["Did you mean 'context'"]),
        ({"rope_axes": [0]}, ["1 rope_axes of 0 rope_frequencies"]),
        ({"eos": 0.5}, ["eos", "0.5 is not a whole number"]),
    ],
)
def test_engine_json_is_typed(
    engine_made: Path, tmp_path: Path, changes: dict[str, object], named: list[str]
) -> None:
    engine = sealed(Path(shutil.copytree(engine_made, tmp_path / "engine")), **changes)
    refused(cli("generate", engine, "--prompt", "x"), *named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"params": {"precision": "int8"}}, ["its key is not that of its own parameters"]),
        ({"inputs": {}}, ["its key is not that of its own parameters"]),
        ({"files": []}, ["files is not a JSON object"]),
        ({"key": "x"}, ["key is 'x', not a sha256"]),
        ({"kind": "engin"}, ["kind is 'engin', not one of"]),
        ({"wall_seconds": None}, ["wall_seconds is None, not a number"]),
        ({"parent": {"schema": 1}}, ["parent lacks key"]),
        ({"pending": 5}, ["pending is not a JSON object"]),
        ({"schema": 2}, ["is not a manifest of schema 1"]),
    ],
)
def test_a_manifest_is_typed(
    engine_made: Path, tmp_path: Path, changes: dict[str, object], named: list[str]
) -> None:
    engine = Path(shutil.copytree(engine_made, tmp_path / "engine"))
    manifest = store.read_manifest(engine)
    store.write_json(engine / "manifest.json", {**manifest, **changes})
    refused(cli("generate", engine, "--prompt", "x"), *named)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a//b", "", "."])
def test_no_file_of_a_manifest_lies_elsewhere(engine_made: Path, tmp_path: Path, name: str) -> None:
    engine = Path(shutil.copytree(engine_made, tmp_path / "engine"))
    (tmp_path / "outside").write_bytes(b"x")
    manifest = store.read_manifest(engine)
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    manifest["files"][name] = entry
    store.write_json(engine / "manifest.json", manifest)
    refused(cli("generate", engine, "--prompt", "x"), f"names the file '{name}'")


def test_a_link_out_of_an_engine_is_refused(engine_made: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(engine_made, tmp_path / "engine"))
    shutil.move(engine / "tokenizer.json", tmp_path / "tokenizer.json")
    (engine / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    refused(cli("generate", engine, "--prompt", "x"), "tokenizer.json", "leads out of")


def test_reference_answers_of_another_engine(engine_made: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(engine_made, tmp_path / "engine"))
    with np.load(engine / "reference.npz") as file:
        arrays = dict(file)
    for name, array, words in (
        ("logits", arrays["logits"][:, :, :-1], "the engine gives 288"),
        ("windows", arrays["windows"] + 288, "beyond the vocabulary of 288"),
    ):
        np.savez(engine / "reference.npz", **{**arrays, name: array})
        refused(cli("verify", sealed(engine)), "not of this engine", words)
