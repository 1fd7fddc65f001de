"""Records: one measured number a line, beside the artifact it belongs to.

They are appended after an artifact is finished, so no manifest lists them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import decode_json
from edgemed.documents.bench import BenchRecord
from edgemed.documents.document import plain
from edgemed.documents.limited_files import read_limited
from edgemed.errors import EdgemedError

RECORDS = "records.jsonl"
LARGEST = 64 << 20  # bytes; a record has about 1,500


def append_records(
    directory: Path, records: Sequence[BenchRecord] | Sequence[Mapping[str, Any]]
) -> None:
    """Add measured numbers beside an engine, or the JSON objects of some: all or none of them.

    Raises OSError that names the file where they cannot be written.
    """
    path = Path(directory) / RECORDS
    lines = "".join(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records)
    length = path.stat().st_size if path.exists() else None
    try:
        with open(path, "ab") as handle:
            handle.write(lines.encode("utf-8"))
    except OSError as error:
        # Half a line would make every later reader stop.
        with contextlib.suppress(OSError):
            if length is None:
                path.unlink()
            else:
                os.truncate(path, length)
        error.filename = str(path)
        raise


def read_records(directory: Path) -> list[dict[str, Any]]:
    """All records beside an engine, as JSON objects. Raises EdgemedError naming a line that is not
    one, such as the last before a power cut, and a key with a value of another type.
    """
    path = Path(directory) / RECORDS
    if not path.is_file():
        return []
    content = read_limited(path, "Remove it and measure again", LARGEST)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        if not line and not records:
            continue  # an empty file
        try:
            record = decode_json(line)
        except ValueError as error:
            raise EdgemedError(
                f"{path} line {number} is not JSON ({error})", "Remove that line"
            ) from None
        BenchRecord.from_json(record, f"{path} line {number}")
        records.append(record)
    return records
