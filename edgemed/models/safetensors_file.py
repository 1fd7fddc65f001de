"""A safetensors file: its header, checked as the format's own library checks it, and its tensors.

A file is an 8-byte length, a JSON header of that length, then the tensors' bytes, from which the
offsets count. A header is a few kilobytes that say where gigabytes lie, so nothing in it is
believed: sizes, order and lengths must fit the file before a tensor is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts.json_files import decode_json
from edgemed.errors import EdgemedError
from edgemed.models.tensor_entry import (
    ITEM_BYTES,
    Entry,
    element_count,
    is_size,
    read_entry,
    shortened,
)

if TYPE_CHECKING:
    import torch

# the format's name of a dtype -> torch's
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# The format's own limit on a header, in bytes.
MOST_HEADER_BYTES = 100_000_000
METADATA = "__metadata__"
# Bytes without any content that a file may have. A download that was broken off after its space was
# reserved leaves more; a file system that stores long runs of zeros this way leaves less.
MOST_HOLES = 1 << 30


def safetensors_entries(file: Path) -> dict[str, Entry]:
    """tensor -> where it lies. Raises EdgemedError for a file that cannot be read, is damaged,
    truncated or partly unwritten, or holds a dtype that is not read.
    """
    header, start, size = _header(file)
    entries = {}
    for name, info in header.items():
        if name == METADATA:
            continue
        try:
            entries[name] = _entry(file, name, info, start)
        except ValueError as error:
            raise _damaged(file, f"tensor '{shortened(name)}': {error}") from None
    _check_layout(file, entries, start, size)
    _check_written(file, size)
    return entries


def metadata(file: Path) -> dict[str, str]:
    """The free words in a safetensors file's header; {} where there are none, or the file is of
    another kind.
    """
    if file.suffix != ".safetensors":
        return {}
    header, _, _ = _header(file)
    words: dict[str, str] = header.get(METADATA) or {}
    return words


def read_tensors(file: Path, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file, all or those of `names`. Raises EdgemedError where it is
    damaged.
    """
    return {
        name: read_entry(entry)
        for name, entry in safetensors_entries(Path(file)).items()
        if names is None or name in names
    }


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, first byte behind it, bytes of the file)."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise _damaged(file, f"{size} bytes are no header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MOST_HEADER_BYTES):
                raise _damaged(file, f"a header of {length} bytes in a file of {size}")
            content = handle.read(length)
    except OSError as error:
        raise EdgemedError(
            f"{file} cannot be read: {error.strerror}", "Check its permissions"
        ) from None
    try:
        header = decode_json(content)
    except ValueError as error:
        raise _damaged(file, f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    words = header.get(METADATA)
    if words is not None and not (
        isinstance(words, dict) and all(isinstance(value, str) for value in words.values())
    ):
        raise _damaged(file, f"{METADATA} is not a mapping of texts")
    return header, 8 + length, size


def _entry(file: Path, name: str, info: Any, start: int) -> Entry:
    """One tensor's entry. Raises ValueError for values of a wrong type or size."""
    if not isinstance(info, dict):
        raise ValueError("its entry is no JSON object")
    dtype = info.get("dtype")
    shape = info.get("shape")
    offsets = info.get("data_offsets")
    if not isinstance(dtype, str):
        raise ValueError(f"its dtype is {shortened(dtype)}")
    if not isinstance(shape, list) or not all(is_size(axis) for axis in shape):
        raise ValueError(f"its shape is {shortened(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise ValueError(f"its data_offsets are {shortened(offsets)}")
    if dtype not in DTYPES:
        raise EdgemedError(
            f"{file}: tensor '{shortened(name)}' has the dtype {shortened(dtype)}, which edgemed"
            " does not read",
            "Convert it to F32, F16 or BF16",
        )
    begin, end = offsets
    needed = element_count(tuple(shape)) * ITEM_BYTES[DTYPES[dtype]]
    if end - begin != needed:
        raise ValueError(
            f"{dtype} of shape {shortened(shape)} is {needed} bytes, its data_offsets hold"
            f" {end - begin}"
        )
    return Entry(
        file=file,
        dtype=DTYPES[dtype],
        shape=tuple(shape),
        offset=start + begin,
        nbytes=needed,
    )


def _check_layout(file: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Raise EdgemedError unless the tensors fill the rest of the file one behind the other."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            kind = "overlaps the one before it" if entry.offset < position else "follows a gap"
            raise _damaged(file, f"tensor '{shortened(name)}' {kind}")
        position += entry.nbytes
    if position > size:
        raise EdgemedError(
            f"{file} is truncated: {size} bytes on disk, {position} needed", "Download it again"
        )
    if position < size:
        raise _damaged(file, f"{size - position} bytes behind its last tensor belong to none")


def _check_written(file: Path, size: int) -> None:
    """Raise EdgemedError where much of a file was never written: its space is reserved, reading
    gives zeros.
    """
    if size - file.stat().st_blocks * 512 <= MOST_HOLES or not hasattr(os, "SEEK_HOLE"):
        return
    holes = 0
    position = 0
    with open(file, "rb") as handle:
        while position < size:
            hole = os.lseek(handle.fileno(), position, os.SEEK_HOLE)
            if hole >= size:
                break
            try:
                position = os.lseek(handle.fileno(), hole, os.SEEK_DATA)
            except OSError:
                # No data follows: the hole reaches to the end.
                position = size
            holes += position - hole
    if holes > MOST_HOLES:
        raise EdgemedError(
            f"{file}: {holes} of its {size} bytes were never written", "Download it again"
        )


def _damaged(file: Path, reason: str) -> EdgemedError:
    return EdgemedError(f"{file} is damaged or truncated: {reason}", "Download it again")
