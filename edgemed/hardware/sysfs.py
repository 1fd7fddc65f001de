"""Reads the kernel's own files (/sys, /proc, /etc) below a root that tests may replace by a
recorded tree.

On a board half of these files exist and some refuse to be read; where one does, the fact is not
known, which is no error. Who must tell 'not there' from 'not allowed' asks for that by name.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path


def text(path: Path) -> str | None:
    """A file without trailing blanks and NULs; None where it does not exist or the kernel does not
    give it (EIO, EAGAIN, ENODATA, EACCES).
    """
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n\t ")
    return None


def number(path: Path) -> int | None:
    """The whole number a file starts with (decimal, or hexadecimal with 0x), or None where there is
    none to read.
    """
    digits = re.match(r"0x[0-9a-fA-F]+|-?\d+", text(path) or "")
    if digits is None:
        return None
    # A decimal number may begin with zeros, which base 0 refuses.
    return int(digits[0], 16 if digits[0].startswith("0x") else 10)


def forbidden(path: Path) -> bool:
    """Whether the file is there and this user may not read it."""
    try:
        path.read_bytes()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def in_order(paths: list[Path]) -> list[Path]:
    """By the numbers in their names, so that cpu10 comes after cpu9."""
    return sorted(
        paths,
        key=lambda path: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))
        ],
    )
