"""Values of a DICOM header, each read with the fault it may have.

pydicom converts a value when it is first asked for, and raises whatever its converters meet. Here
a value is a number, absent, or an error that names its attribute.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError

EXPORT_AGAIN = "Export it from the archive again"
TABLE_ENTRIES = 65536  # of a lookup table whose descriptor says 0


@contextlib.contextmanager
def readable(name: str, part: str, fault: str = "") -> Iterator[None]:
    """Turn whatever pydicom and its decoders raise for a damaged file into one line, and keep their
    warnings off the screen. fault: what the line says in place of 'its header cannot be read'.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EdgemedError:
        raise
    except Exception as error:
        # Their parsers raise struct.error, KeyError, RecursionError, MemoryError and many more.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise EdgemedError(
            f"{name} {fault}: {reason}" if fault else f"{name}: {part} cannot be read: {reason}",
            EXPORT_AGAIN,
        ) from None


def values_of(item: Any, keyword: str) -> list[Any]:
    """All values of an attribute, without trailing empty ones; none where it is absent or empty."""
    if keyword not in item:
        return []
    value = item[keyword].value
    if value is None or isinstance(value, str | bytes):
        return [value] if value else []
    return list(value) if hasattr(value, "__iter__") else [value]


def numbers(item: Any, keyword: str, name: str) -> list[float | None]:
    """The finite numbers of an attribute; None where one of several is empty.

    Raises EdgemedError where a value is no number.
    """
    found: list[float | None] = []
    try:
        for value in values_of(item, keyword):
            number = None if value in (None, "") else float(value)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{value} is not finite")
            found.append(number)
    except (ValueError, TypeError, OverflowError) as error:
        raise EdgemedError(f"{name}: {keyword} is no number: {error}", EXPORT_AGAIN) from None
    return found


def number(item: Any, keyword: str, name: str) -> float | None:
    """The first of `numbers`; None where there is none."""
    return next(iter(numbers(item, keyword, name)), None)


def whole_number(item: Any, keyword: str, name: str) -> int | None:
    """The first of `numbers` as an int. Raises EdgemedError where it has a fraction."""
    value = number(item, keyword, name)
    if value is not None and value != int(value):
        raise EdgemedError(f"{name}: {keyword} {value} is no whole number", EXPORT_AGAIN)
    return None if value is None else int(value)


def text(item: Any, keyword: str) -> str:
    """The first value of a text attribute, in capitals; '' where it is absent or empty."""
    values = values_of(item, keyword)
    return str(values[0] or "").strip().upper() if values else ""


def items(data: Any, keyword: str) -> list[Any]:
    """The items of a sequence; none where it is absent or empty."""
    return list(data[keyword].value or []) if keyword in data else []


def functional_group(data: Any, frame: int, keyword: str) -> Any | None:
    """The item of an enhanced multi-frame object that says something about one frame: from the
    frame's own functional groups, else from those that all frames share (PS3.3 C.7.6.16).
    """
    frames = items(data, "PerFrameFunctionalGroupsSequence")
    shared = items(data, "SharedFunctionalGroupsSequence")
    for group in (*frames[frame : frame + 1], *shared[:1]):
        found = items(group, keyword)
        if found:
            return found[0]
    return None


def lookup_table(
    item: Any, descriptor: str, data_keyword: str, name: str
) -> tuple[np.ndarray, int, int]:
    """(entries, the stored value of the first of them, bits of an entry) of a lookup table
    (PS3.3 C.11.1.1.1).

    Raises EdgemedError for a descriptor that is none, and for data shorter than it says.
    """
    first_three = [value or 0 for value in numbers(item, descriptor, name)]
    if len(first_three) != 3 or not 1 <= first_three[2] <= 16:
        raise EdgemedError(f"{name}: {descriptor} {first_three} describes no table", EXPORT_AGAIN)
    length = int(first_three[0]) or TABLE_ENTRIES
    bits = int(first_three[2])
    value = item[data_keyword].value if data_keyword in item else b""
    if isinstance(value, bytes):
        # Entries of 8 bits may be packed, or each have 16 bits of their own.
        packed = bits <= 8 and len(value) < 2 * length
        entries = np.frombuffer(value[: len(value) // 2 * 2], "<u2")
        if packed:
            entries = np.frombuffer(value, np.uint8)
        elif big_endian(item):
            entries = entries.byteswap()
    else:
        entries = np.array(values_of(item, data_keyword), np.int64) & 0xFFFF
    if len(entries) < length or length < 1:
        raise EdgemedError(
            f"{name}: {data_keyword} has {len(entries)} entries, its descriptor says {length}",
            EXPORT_AGAIN,
        )
    return entries[:length].astype(np.int64), int(first_three[1]), bits


def big_endian(item: Any) -> bool:
    """Whether words of a dataset or an item of a sequence are stored with the high byte first."""
    encoding = getattr(item, "original_encoding", (None, None))
    return encoding[1] is False


def looked_up(values: np.ndarray, entries: np.ndarray, first: int) -> np.ndarray:
    """Values through a lookup table; those outside take its first or last entry (C.11.1.1.1)."""
    index = np.clip(np.rint(values) - first, 0, len(entries) - 1).astype(np.int64)
    return entries[index]
