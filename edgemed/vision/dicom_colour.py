"""Colour DICOM values as RGB of 8 bits: RGB, YBR_FULL and palettes, whole or in segments
(PS3.3 C.7.6.3.1.2, C.7.9.2 and C.8.16.2).

A channel's white is its greatest possible value, never the greatest of one picture: two frames of a
film keep their colours. ICC profiles are not applied, as in most viewers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.vision.dicom_greyscale import BLOCK, mapped_from
from edgemed.vision.dicom_header import (
    EXPORT_AGAIN,
    TABLE_ENTRIES,
    big_endian,
    looked_up,
    lookup_table,
    numbers,
)
from edgemed.vision.dicom_pixels import StoredFrame

PALETTE = "PALETTE COLOR"
CHANNELS = ("Red", "Green", "Blue")
DISCRETE = 0
LINEAR = 1
INDIRECT = 2  # the kinds of segments


def is_colour(data: Any, stored: StoredFrame) -> bool:
    """Whether the stored values are colours, or numbers of a palette's."""
    return stored.values.ndim == 3 or stored.kind == PALETTE


def shown(data: Any, stored: StoredFrame, name: str) -> tuple[np.ndarray, str]:
    """(RGB uint8 [rows, columns, 3], what was applied in words).

    Raises EdgemedError for a photometric interpretation or a palette that is not understood.
    """
    if stored.kind == PALETTE and stored.values.ndim == 2:
        tables, first = palette(data, name)
        channels = [looked_up_levels(stored.values, table, first) for table in tables]
        return np.stack(channels, -1), "palette"
    if stored.values.dtype.kind != "u":
        raise EdgemedError(
            f"{name}: colours are stored as {stored.values.dtype}",
            "Export it as unsigned integers",
        )
    if stored.kind in ("YBR_FULL", "YBR_FULL_422"):
        return _rgb_of_ybr(stored), "YBR_FULL"
    if stored.kind != "RGB":
        raise EdgemedError(
            f"{name}: the PhotometricInterpretation '{stored.kind}' is not read",
            "Known: MONOCHROME1, MONOCHROME2, RGB, YBR_FULL, YBR_FULL_422, YBR_RCT, YBR_ICT and"
            " PALETTE COLOR",
        )
    if stored.bits == 8 and stored.values.dtype == np.uint8:
        return np.ascontiguousarray(stored.values), "RGB"
    white = 2**stored.bits - 1
    levels = _by_rows(stored.values, lambda rows: np.rint(rows.astype(np.float64) * (255 / white)))
    return levels, f"RGB of {stored.bits} bits"


def _by_rows(values: np.ndarray, levels: Any) -> np.ndarray:
    """A function of pixels on a few rows at a time, as uint8 0 to 255."""
    rows = max(1, BLOCK // (3 * values.shape[1]))
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), rows):
        result[start : start + rows] = np.clip(levels(values[start : start + rows]), 0, 255)
    return result


def _rgb_of_ybr(stored: StoredFrame) -> np.ndarray:
    """YBR_FULL as RGB (PS3.3 C.7.6.3.1.2), at any number of bits."""
    half = 2 ** (stored.bits - 1)
    white = 2**stored.bits - 1

    def converted(rows: np.ndarray) -> np.ndarray:
        y, b, r = (rows[..., channel].astype(np.float32) for channel in range(3))
        b -= half
        r -= half
        green = y - (0.114 * 1.772 / 0.587) * b - (0.299 * 1.402 / 0.587) * r
        colours = np.stack([y + 1.402 * r, green, y + 1.772 * b], -1)
        return np.floor(np.clip(colours * (255 / white), 0, 255) + 0.5)

    return _by_rows(stored.values, converted)


def palette(data: Any, name: str) -> tuple[list[np.ndarray], int]:
    """(red, green and blue as uint8, the stored value of their first entry).

    Raises EdgemedError where there is no whole palette.
    """
    tables = []
    first = 0
    for channel in CHANNELS:
        descriptor = f"{channel}PaletteColorLookupTableDescriptor"
        segmented = f"Segmented{channel}PaletteColorLookupTableData"
        whole = f"{channel}PaletteColorLookupTableData"
        if whole in data:
            entries, first, bits = lookup_table(data, descriptor, whole, name)
        elif segmented in data:
            entries, first, bits = _segmented(data, descriptor, segmented, name)
        else:
            raise EdgemedError(f"{name}: its palette has no {channel.lower()}", EXPORT_AGAIN)
        tables.append((entries, bits))
    # The high byte of 16 bits, whether the low one repeats it or is empty. Some writers fill the
    # low byte only.
    greatest = max(int(entries.max()) for entries, _ in tables)
    levels = []
    for entries, bits in tables:
        shift = max(0, bits - 8) if greatest > 255 else 0
        levels.append((entries >> shift).astype(np.uint8))
    return levels, first


def looked_up_levels(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """Stored values through one channel of a palette, uint8."""
    result = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK // values.shape[1])
    for start in range(0, len(values), rows):
        result[start : start + rows] = looked_up(
            values[start : start + rows].astype(np.float64), table, first
        )
    return result


def supplemented(data: Any, stored: StoredFrame, grey: np.ndarray, name: str) -> np.ndarray | None:
    """A grey picture with the colours of its supplemental palette, RGB uint8; None where it has
    none.
    """
    mapped = mapped_from(data, name)
    if mapped is None:
        return None
    tables, first = palette(data, name)
    coloured = stored.values >= mapped
    channels = [
        np.where(coloured, looked_up_levels(stored.values, table, first), grey) for table in tables
    ]
    return np.stack(channels, -1)


def _segmented(data: Any, descriptor: str, keyword: str, name: str) -> tuple[np.ndarray, int, int]:
    """(entries, stored value of the first, bits) of a palette that is stored as segments
    (PS3.3 C.7.9.2).
    """
    described = [int(value or 0) for value in numbers(data, descriptor, name)]
    if len(described) != 3 or described[2] not in (8, 16):
        raise EdgemedError(f"{name}: {descriptor} {described} describes no table", EXPORT_AGAIN)
    length = described[0] or TABLE_ENTRIES
    stream = data[keyword].value
    if described[2] == 8:
        words = np.frombuffer(stream, np.uint8)
    else:
        order = ">u2" if big_endian(data) else "<u2"
        words = np.frombuffer(stream[: len(stream) // 2 * 2], order)
    expansion = _Expansion(words.tolist(), described[2] // 8, length)
    try:
        expansion.run(0, 0)
    except (IndexError, ValueError) as error:
        raise EdgemedError(f"{name}: {keyword} is damaged: {error}", EXPORT_AGAIN) from None
    entries = expansion.entries
    if len(entries) < length:
        raise EdgemedError(
            f"{name}: {keyword} makes {len(entries)} entries, its descriptor says {length}",
            EXPORT_AGAIN,
        )
    return np.array(entries[:length], np.int64), described[1], described[2]


class _Expansion:
    """The entries of a palette from its segments, at most `length` and one segment more.

    words: the data; width: bytes of a word.
    """

    def __init__(self, words: list[int], width: int, length: int):
        self.words = words
        self.width = width
        self.length = length
        self.entries: list[int] = []

    def run(self, start: int, copied: int) -> None:
        """Append the segments from a word on. copied: 0 for all of them, else how many an indirect
        segment repeats; there must be no indirect one among those.

        Raises ValueError or IndexError for damaged data.
        """
        at = start
        segments = 0
        # A single word at the end is padding.
        while at + 1 < len(self.words) and len(self.entries) < self.length:
            if copied and segments == copied:
                return
            kind, count = self.words[at : at + 2]
            if kind == DISCRETE:
                values = self.words[at + 2 : at + 2 + count]
                if len(values) < count:
                    raise ValueError("a segment is longer than the data")
                self.entries += values
                at += 2 + count
            elif kind == LINEAR:
                self._line(self.words[at + 2], count)
                at += 3
            elif kind == INDIRECT and not copied and count:
                self.run(self._offset(at + 2), count)
                at += 2 + 4 // self.width
            else:
                raise ValueError(f"a segment of kind {kind} does not belong here")
            segments += 1

    def _line(self, last: int, count: int) -> None:
        """`count` entries from the one before, which is not repeated, to the last."""
        if not self.entries:
            raise ValueError("it begins with a line from nowhere")
        line = np.linspace(self.entries[-1], last, count + 1)[1:]
        self.entries += [int(value) for value in np.rint(line)]

    def _offset(self, at: int) -> int:
        """The word at a byte offset of 32 bits, its low part first."""
        parts = self.words[at : at + 4 // self.width]
        offset = sum(part << (8 * self.width * n) for n, part in enumerate(parts))
        if offset % self.width or offset // self.width >= len(self.words):
            raise ValueError("a segment lies outside the data")
        return offset // self.width
