"""The manifest beside every artifact: what it was made from, what it holds, and what was measured
while it was made.

Its JSON is part of the product: keys and their order stay as they are, because signatures and
reports rest on the file's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import read_json_object
from edgemed.errors import EdgemedError

MANIFEST = "manifest.json"
SCHEMA = 1
FIX = "Make the artifact again"


@dataclass(frozen=True)
class Manifest:
    """A manifest's sections, in the order in which they are written."""

    schema: int
    # digest of kind, stage, params, inputs and schema
    key: str
    # 'checkpoint', 'engine', 'plan', 'reference' or 'result'
    kind: str
    # the step or target that made it
    stage: str
    params: Mapping[str, Any]
    # name -> sha256 of what it was made from
    inputs: Mapping[str, Any]
    # name -> {sha256, bytes} of what it holds, and 'attached' where it was added afterwards
    files: Mapping[str, Mapping[str, Any]]
    # what the step or target reports about its work
    notes: Mapping[str, Any] = field(default_factory=dict)
    # package -> version
    versions: Mapping[str, str] = field(default_factory=dict)
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None
    # UTC, '2026-01-01T00:00:00Z'
    created: str = ""
    # the manifest of the artifact it was made from
    parent: Mapping[str, Any] | None = None
    # Documents whose replacement was cut short: name -> the entries that are right, old and new.
    # None where no replacement is under way.
    pending: Mapping[str, list[Mapping[str, Any]]] | None = None
    # sections attached afterwards ('evals', 'gate' and so on), by name
    sections: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of an artifact. Raises EdgemedError where there is none or it cannot be
        read.
        """
        return cls.from_json(read_manifest(directory), str(Path(directory) / MANIFEST))

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str) -> Manifest:
        """A manifest from its JSON object. where: names it in messages. Raises EdgemedError where a
        section that every manifest has is missing.
        """
        missing = [name for name in REQUIRED if name not in document]
        if missing:
            raise EdgemedError(f"{where} lacks '{missing[0]}'", FIX)
        built = {name: document[name] for name in BUILT if name in document}
        sections = {name: value for name, value in document.items() if name not in BUILT}
        return cls(**built, sections=sections)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is written."""
        document = {name: getattr(self, name) for name in BUILT if name != "pending"}
        document.update(self.sections)
        if self.pending is not None:
            document["pending"] = self.pending
        return document


# Sections that are written when an artifact is made. Those attached afterwards have other names.
BUILT = tuple(name for name in Manifest.__dataclass_fields__ if name != "sections")
REQUIRED = ("schema", "key", "kind", "stage", "params", "inputs", "files")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The JSON object of an artifact's manifest. Raises EdgemedError where there is none or it
    cannot be read.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise EdgemedError(
            f"{directory} has no {MANIFEST}",
            "Give a directory made by edgemed export or edgemed run",
        )
    document = read_json_object(path, FIX)
    if document.get("schema") != SCHEMA:
        raise EdgemedError(
            f"{path} is not a manifest of schema {SCHEMA}",
            "Make the artifact again with this version of edgemed",
        )
    return document


def size_of(manifest: Mapping[str, Any]) -> int:
    """Bytes of what was built, from a manifest's JSON object; documents attached afterwards are not
    counted.
    """
    return sum(entry["bytes"] for entry in manifest["files"].values() if not entry.get("attached"))
