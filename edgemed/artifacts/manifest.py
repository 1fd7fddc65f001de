"""Reads the manifest beside an artifact: what it was made from, what it holds, and how it was made.

The types are in edgemed.documents.manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import read_json_object
from edgemed.documents.manifest import ArtifactManifest
from edgemed.errors import EdgemedError

MANIFEST = "manifest.json"
SCHEMA = 1
FIX = "Make the artifact again"


def open_manifest(directory: Path) -> ArtifactManifest:
    """The manifest of an artifact. Raises EdgemedError where there is none, it cannot be read, or a
    key that every manifest has is missing.
    """
    return ArtifactManifest.from_json(read_manifest(directory), str(Path(directory) / MANIFEST))


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
