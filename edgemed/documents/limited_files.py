"""Reads a file from outside into memory, as far as it may be that large.

A file may be a pipe that nobody writes to, a device that never ends, or larger than the memory.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgemed.errors import EdgemedError


def read_limited(path: Path, fix: str, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes. fix: what to do otherwise.

    Raises EdgemedError where there is no such file, it cannot be read, is larger, or is no regular
    file.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as handle:
            regular = stat.S_ISREG(os.fstat(handle.fileno()).st_mode)
            content = handle.read(largest + 1) if regular else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EdgemedError(f"{path} cannot be read: {reason}", fix) from None
    if not regular:
        raise EdgemedError(f"{path} cannot be read: it is not a regular file", fix)
    if len(content) > largest:
        raise EdgemedError(f"{path} is larger than {largest / 1e6:.1f} MB", fix)
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe that nobody writes to would be waited for.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
