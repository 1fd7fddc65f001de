"""JSON files, written so that a reader never sees half of one, and read with errors in one line.

This is the one door for JSON from outside: manifests, engine descriptions, configs, rows and
reports. What a parser would let through in silence (a key given twice, NaN, half a character) is
refused here, and so is what would take a machine's memory or a parser's stack.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from edgemed.documents.limited_files import read_limited
from edgemed.errors import EdgemedError, one_line

# The largest tokenizer.json known has 35 MB. A file of this size becomes at most about 1.5 GB of
# Python objects.
LARGEST = 64 << 20
DEEPEST = 100  # brackets within brackets; a manifest with ten ancestors has 40
DIGITS = 60  # of a whole number; tokenizer_config.json says 10^30 for "no limit"
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_text(path, json_text(value))


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


def json_text(value: Any) -> str:
    """A value as `write_json` writes it."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path, fix: str, largest: int = LARGEST) -> Any:
    """The JSON value in a file of UTF-8. fix: what to do where it cannot be read. largest: bytes.

    Raises EdgemedError where the file cannot be read, is larger, or as `parse_json` does.
    """
    return parse_json(read_limited(path, fix, largest), str(path), fix)


def read_json_object(path: Path, fix: str, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file. fix: what to do where it cannot be read. largest: bytes.

    Raises EdgemedError as `read_json` does, and where the file holds something else than an object.
    """
    value = read_json(path, fix, largest)
    if not isinstance(value, dict):
        raise EdgemedError(f"{path} is not a JSON object", fix)
    return value


def parse_json(content: bytes | str, where: str, fix: str) -> Any:
    """The JSON value in a text. where: names it in messages; fix: what to do where it is no JSON.

    Raises EdgemedError for what `decode_json` refuses.
    """
    try:
        return decode_json(content)
    except ValueError as error:
        raise EdgemedError(f"{where} cannot be read: {error}", fix) from None


def decode_json(content: bytes | str) -> Any:
    """The JSON value in a text.

    Raises ValueError, with the reason in one line, for bytes that are not UTF-8 or begin with a
    byte-order mark, what is not JSON or not only JSON, NaN, an infinite or a too long number, a key
    given twice, half a character (a lone surrogate), and brackets deeper than DEEPEST.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte-order mark")
        value = _decoder().decode(text)
        _check_depth(value)
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"half a character (surrogate {half!a})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"brackets deeper than {DEEPEST}") from None
    return value


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_int=_integer,
        parse_float=_number,
        parse_constant=_constant,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"key '{one_line(twice[:80])}' is given twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits[:20]} is too large")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise RecursionError
