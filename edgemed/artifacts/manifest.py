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
from edgemed.params import in_short

MANIFEST = "manifest.json"
SCHEMA = 1
FIX = "Make the artifact again"
LONGEST_NAME = 1000  # characters


def open_manifest(directory: Path) -> ArtifactManifest:
    """The manifest of an artifact. Raises EdgemedError where there is none, it cannot be read, or a
    key that every manifest has is missing or has another type.
    """
    return ArtifactManifest.from_json(read_manifest(directory))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The JSON object of an artifact's manifest, checked as `open_manifest` checks it.

    Raises EdgemedError where there is none, it cannot be read, a value has another type than
    ArtifactManifest says, or a file's name leads out of the directory. Sections attached later are
    checked where they are read.
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
    _checked(document, path)
    return document


def _checked(document: Mapping[str, Any], path: Path) -> ArtifactManifest:
    manifest = ArtifactManifest.from_json(document, str(path))
    for name in (*manifest.files, *(manifest.pending or ())):
        if not is_inside(name):
            raise EdgemedError(f"{path} names the file {in_short(name)}: no path below it", FIX)
    return manifest


def is_inside(name: str) -> bool:
    """Whether a file's name in a manifest is a plain path below the artifact's directory."""
    return (
        0 < len(name) <= LONGEST_NAME
        and not name.startswith("/")
        and "\\" not in name
        and "\0" not in name
        and not {"", ".", ".."} & set(name.split("/"))
    )


def size_of(manifest: Mapping[str, Any]) -> int:
    """Bytes of what was built, from a manifest's JSON object; documents attached afterwards are not
    counted.
    """
    return sum(entry["bytes"] for entry in manifest["files"].values() if not entry.get("attached"))
