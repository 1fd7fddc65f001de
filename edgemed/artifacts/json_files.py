"""Reads the JSON documents that edgemed and others write beside a model.

A file that was cut off by a full disk, or edited by hand, must end in one clear line. So every
reader of such a document goes through this module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError


def read_json_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file. fix: the sentence that says what to do where it is not one.

    Raises EdgemedError where the file cannot be read, is not JSON, or holds something else than an
    object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise EdgemedError(f"{path} cannot be read: {error}", fix) from None
    if not isinstance(document, dict):
        raise EdgemedError(f"{path} is not a JSON object", fix)
    return document
