"""Digests of values and of files.

An artifact's key is the digest of what it was made from, so the same content gives the same name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def canonical(value: Any) -> bytes:
    """A JSON-able value in its one canonical form: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file; remembered within the process while inode, size and times of the last
    change stay the same.
    """
    status = os.stat(path)
    changed = (status.st_mtime_ns, status.st_ctime_ns)
    return _sha256(str(path), status.st_size, changed, status.st_ino)


def clear_hash_cache() -> None:
    """Read every file anew from here on: a modification time can be set back, and a signature must
    not rest on it.
    """
    _sha256.cache_clear()


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: tuple[int, int], inode: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
