"""JSON files, written so that a reader never sees half of one, and read with errors in one line.

Manifests, engine descriptions, configs and reports all go through these two functions.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text as `write_json` does. Where it cannot be written nothing is left behind.

    Raises OSError that names `path` for a full disk, a file size limit and the like.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        # The kernel does not say which file a write was for.
        error.filename = str(path)
        error.filename2 = None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
