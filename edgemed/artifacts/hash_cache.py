"""Hashes of large files, remembered between processes, so that an engine of gigabytes need not be
read whole each time it is opened.

A remembered hash is believed while the file has the same inode, size and times of its last change
(content and inode). Whoever can change the file without changing these, or can write into the
cache, is not found out this way. `edgemed verify` and `generate --check` read every byte.

The cache is hashes.json in $EDGEMED_CACHE, else in $XDG_CACHE_HOME/edgemed, else in
~/.cache/edgemed. It may be removed at any time. Where it cannot be written, nothing is remembered.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from edgemed.artifacts.hashing import file_sha256
from edgemed.artifacts.json_files import read_json_object, write_json
from edgemed.errors import EdgemedError

FILE = "hashes.json"
LARGE = 16 << 20  # bytes; smaller files are read whole each time, in some hundredths of a second
MOST_ENTRIES = 500
LARGEST_CACHE = 1 << 20  # bytes
# A file that changed so shortly before may change again within the same tick of the clock.
SETTLED_NS = 2_000_000_000


def remembered_sha256(path: Path) -> str:
    """sha256 of a file; of a large one as it was remembered, where it has not changed since.

    Raises OSError where the file cannot be read.
    """
    status = os.stat(path)
    if status.st_size >= LARGE:
        entry = _read().get(str(path.resolve()))
        if isinstance(entry, dict) and entry.get("stamp") == _stamp(status):
            return str(entry.get("sha256"))
    return fresh_sha256(path)


def fresh_sha256(path: Path) -> str:
    """sha256 of a file that is read for it; that of a large one is remembered.

    Raises OSError where the file cannot be read.
    """
    status = os.stat(path)
    sha256 = file_sha256(path)
    if status.st_size < LARGE:
        return sha256
    stamp = _stamp(status)
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    if _stamp(os.stat(path)) == stamp and time.time_ns() - changed > SETTLED_NS:
        _remember(str(path.resolve()), {"stamp": stamp, "sha256": sha256})
    return sha256


def _stamp(status: os.stat_result) -> str:
    return (
        f"{status.st_dev}:{status.st_ino}:{status.st_size}"
        f":{status.st_mtime_ns}:{status.st_ctime_ns}"
    )


def _folder() -> Path:
    if own := os.environ.get("EDGEMED_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "edgemed"
    return Path.home() / ".cache" / "edgemed"


def _read() -> dict[str, object]:
    # A cache that cannot be read is as good as none: the files are then read whole.
    with contextlib.suppress(EdgemedError, RuntimeError):
        return read_json_object(_folder() / FILE, "Remove it", LARGEST_CACHE)
    return {}


def _remember(name: str, entry: dict[str, str]) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        entries = {key: value for key, value in _read().items() if key != name}
        newest = list(entries)[-(MOST_ENTRIES - 1) :]
        write_json(folder / FILE, {key: entries[key] for key in newest} | {name: entry})
