"""The typed manifest: its JSON is what was read, key by key and in order, and a damaged one is
refused in one line.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemed.artifacts import store
from edgemed.artifacts.json_files import read_json_object
from edgemed.artifacts.manifest import open_manifest
from edgemed.errors import EdgemedError


def artifact(tmp_path: Path) -> Path:
    final = tmp_path / "out"
    with store.building(final, "result", "test", {"lengths": (1, 2)}, {"in": "0"}) as work:
        assert work is not None
        (work.path / "file.txt").write_text("hello")
        work.notes["layers"] = {"first": 1.5}
    store.attach(final, {"README.md": b"a card"}, {"gate": {"verdict": "pass"}})
    return final


def test_json_is_what_was_read(tmp_path: Path) -> None:
    final = artifact(tmp_path)
    text = (final / store.MANIFEST).read_text(encoding="utf-8")
    manifest = open_manifest(final)
    assert json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n" == text
    assert list(json.loads(text)) == [
        *("schema", "key", "kind", "stage", "params", "inputs", "files", "notes", "versions"),
        *("wall_seconds", "peak_memory_bytes", "created", "parent", "gate"),
    ]


def test_fields(tmp_path: Path) -> None:
    manifest = open_manifest(artifact(tmp_path))
    assert (manifest.kind, manifest.stage, manifest.parent) == ("result", "test", None)
    assert manifest.params == {"lengths": [1, 2]}
    assert manifest.files["README.md"].attached
    assert manifest.sections == {"gate": {"verdict": "pass"}}
    assert manifest.pending is None


@pytest.mark.parametrize("name", ["key", "kind", "stage", "params", "inputs", "files"])
def test_a_missing_section_is_named(tmp_path: Path, name: str) -> None:
    final = artifact(tmp_path)
    document = store.read_manifest(final)
    del document[name]
    store.write_json(final / store.MANIFEST, document)
    with pytest.raises(EdgemedError, match=f"manifest.json lacks {name}"):
        open_manifest(final)


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "cannot be read"), ("[]", "not a JSON object")]
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(EdgemedError, match=problem):
        read_json_object(file, "Download it again")
