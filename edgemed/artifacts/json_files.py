"""JSON files, written so that a reader never sees half of one, and read with errors in one line.

Manifests, engine descriptions, configs and reports all go through these two functions.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path, fix: str) -> Any:
    """The JSON value in a file. fix: what to do where it cannot be read.

    Raises EdgemedError where the file cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EdgemedError(f"{path} cannot be read: {error}", fix) from None


def read_json_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file. fix: what to do where it cannot be read.

    Raises EdgemedError as `read_json` does, and where the file holds something else than an object.
    """
    value = read_json(path, fix)
    if not isinstance(value, dict):
        raise EdgemedError(f"{path} is not a JSON object", fix)
    return value
