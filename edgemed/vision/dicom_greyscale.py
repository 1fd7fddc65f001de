"""Grey DICOM values as a viewer shows them: modality table or rescale, VOI table or window,
presentation, MONOCHROME1 turned over (PS3.3 C.11 and PS3.4 N.2).

Every stage is a function of one value, so a picture of 16 bits goes through a table of the values
it can have, and a larger one through it in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.vision.dicom_header import (
    EXPORT_AGAIN,
    functional_group,
    items,
    looked_up,
    lookup_table,
    number,
    numbers,
    text,
)
from edgemed.vision.dicom_pixels import StoredFrame

BLOCK = 1 << 20  # values that are computed at a time
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")

# values in, values out, elementwise
Stage = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Window:
    """A VOI window (PS3.3 C.11.2.1.2 and C.11.2.1.3): centre, width and one of FUNCTIONS."""

    centre: float
    width: float
    function: str

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values as shares of white, 0 to 1."""
        if self.function == "SIGMOID":
            # exp of more than 700 is no float64.
            exponent = np.clip(-4 * (values - self.centre) / self.width, -700, 700)
            return 1 / (1 + np.exp(exponent))
        centre = self.centre
        width = self.width
        if self.function == "LINEAR":
            centre -= 0.5
            width -= 1
        if width == 0:
            return (values > centre).astype(np.float64)
        return np.clip((values - centre) / width + 0.5, 0, 1)


def shown(data: Any, stored: StoredFrame, frame: int, name: str) -> tuple[np.ndarray, str]:
    """(grey levels uint8 [rows, columns], what was applied in words).

    Raises EdgemedError for a photometric interpretation, a table, a rescale or a VOI function that
    is not understood, and for values that are not finite.
    """
    if stored.kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise EdgemedError(
            f"{name}: one sample per pixel, and its PhotometricInterpretation is '{stored.kind}'",
            EXPORT_AGAIN,
        )
    check_finite(stored.values, name)
    modality = _modality(data, frame, name)
    voi, how = _voi(data, frame, name)
    if voi is None:
        low, high = _value_range(stored.values, modality, _padding(data, name))
        voi = _between(low, high)
        how = f"no window: {low:g} is black, {high:g} is white" + how
    presented = _presentation(data, stored.kind, name)
    levels = _elementwise(stored.values, lambda v: np.rint(255 * presented(voi(modality(v)))))
    return levels, how


def check_finite(values: np.ndarray, name: str) -> None:
    """Raise EdgemedError where stored floats are not all finite."""
    if values.dtype.kind == "f":
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            raise EdgemedError(
                f"{name}: {bad} of {values.size} pixels are no finite numbers", EXPORT_AGAIN
            )


def _elementwise(values: np.ndarray, levels: Stage) -> np.ndarray:
    """The stages on every stored value, as uint8."""
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        lowest = int(values.min())
        table = levels(np.arange(lowest, int(values.max()) + 1, dtype=np.float64)).astype(np.uint8)
        # In blocks, because indices take eight bytes each.
        return _in_blocks(values, lambda block: table[block.astype(np.int64) - lowest])
    return _in_blocks(values, lambda block: levels(block.astype(np.float64)).astype(np.uint8))


def _in_blocks(values: np.ndarray, levels: Stage) -> np.ndarray:
    flat = values.reshape(-1)
    result = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), BLOCK):
        result[start : start + BLOCK] = levels(flat[start : start + BLOCK])
    return result.reshape(values.shape)


def _modality(data: Any, frame: int, name: str) -> Stage:
    """Stored values to those of the modality, such as Hounsfield units: a table, else a line."""
    tables = items(data, "ModalityLUTSequence")
    if tables:
        entries, first, _ = lookup_table(tables[0], "LUTDescriptor", "LUTData", name)
        return lambda values: looked_up(values, entries, first).astype(np.float64)
    group = functional_group(data, frame, "PixelValueTransformationSequence")
    source = data if group is None else group
    slope = number(source, "RescaleSlope", name)
    intercept = number(source, "RescaleIntercept", name)
    if slope == 0:
        raise EdgemedError(f"{name}: RescaleSlope 0 makes all pixels alike", EXPORT_AGAIN)
    if slope is None and intercept is None:
        return lambda values: values
    factor = 1.0 if slope is None else slope
    offset = intercept or 0.0
    return lambda values: values * factor + offset


def _voi(data: Any, frame: int, name: str) -> tuple[Stage | None, str]:
    """(values of the modality to shares of white, what it is in words); None without a table and
    without a whole window.
    """
    group = functional_group(data, frame, "FrameVOILUTSequence")
    source = data if group is None else group
    tables = items(source, "VOILUTSequence")
    if tables and "LUTDescriptor" in tables[0] and "LUTData" in tables[0]:
        entries, first, bits = lookup_table(tables[0], "LUTDescriptor", "LUTData", name)
        white = 2 ** _bits_used(entries, bits) - 1
        explanation = text(tables[0], "LUTExplanation")
        how = f"VOI table {explanation}".rstrip() + _first_of(len(tables))
        return lambda values: looked_up(values, entries, first) / white, how
    return _window(source, name)


def _window(source: Any, name: str) -> tuple[Stage | None, str]:
    """The first whole and valid window of those the header offers."""
    centres = numbers(source, "WindowCenter", name)
    widths = numbers(source, "WindowWidth", name)
    pairs = list(zip(centres, widths, strict=False))
    function = text(source, "VOILUTFunction") or "LINEAR"
    whole = any(centre is not None and width is not None for centre, width in pairs)
    if whole and function not in FUNCTIONS:
        raise EdgemedError(
            f"{name}: VOILUTFunction '{function}' is not known",
            f"Known: {', '.join(FUNCTIONS)}. {EXPORT_AGAIN}",
        )
    for centre, width in pairs:
        if centre is None or width is None:
            continue
        if width >= 1 or (width > 0 and function != "LINEAR"):
            how = f"window {centre:g}, width {width:g}"
            if function != "LINEAR":
                how += f", {function.lower()}"
            return Window(centre, width, function), how + _first_of(len(pairs))
    # PS3.3 C.11.2.1.2: a linear window has a width of at least 1.
    return None, "; its window has no valid width" if pairs else ""


def _first_of(count: int) -> str:
    return f" (first of {count})" if count > 1 else ""


def _bits_used(entries: np.ndarray, bits: int) -> int:
    """Bits of a VOI table's entries. Some writers put 16 where theirs have 10 or 12: a table that
    reaches not even a quarter of white is taken at its own bits.
    """
    used = int(entries.max()).bit_length()
    return bits if used >= bits - 1 or used == 0 else used


def _padding(data: Any, name: str) -> tuple[float, float] | None:
    """(lowest, highest) stored value that stands for no pixel, None where there is none."""
    value = number(data, "PixelPaddingValue", name)
    if value is None:
        return None
    limit = number(data, "PixelPaddingRangeLimit", name)
    ends = sorted((value, value if limit is None else limit))
    return ends[0], ends[1]


def _value_range(
    stored: np.ndarray, modality: Stage, padding: tuple[float, float] | None
) -> tuple[float, float]:
    """The least and the greatest value of a picture, its padding left out where it has anything
    else.
    """
    low = math.inf
    high = -math.inf
    flat = stored.reshape(-1)
    for ends in (padding, None):
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            if ends is not None:
                block = block[(block < ends[0]) | (block > ends[1])]
            if block.size:
                values = modality(block.astype(np.float64))
                low = min(low, float(values.min()))
                high = max(high, float(values.max()))
        if low <= high:
            break
    return low, high


def _between(low: float, high: float) -> Stage:
    """From black at the least value to white at the greatest; a flat picture is black."""
    if high <= low:
        return lambda values: np.zeros(values.shape)
    return lambda values: np.clip((values - low) / (high - low), 0, 1)


def _presentation(data: Any, kind: str, name: str) -> Stage:
    """Shares of white to those that are displayed: through the presentation table where there is
    one, and turned over once for MONOCHROME1 or the shape INVERSE, which say the same
    (PS3.3 C.8.11.1).
    """
    shape = text(data, "PresentationLUTShape") or "IDENTITY"
    if shape not in ("IDENTITY", "INVERSE"):
        raise EdgemedError(f"{name}: PresentationLUTShape '{shape}' is not known", EXPORT_AGAIN)
    inverted = kind == "MONOCHROME1" or shape == "INVERSE"
    tables = items(data, "PresentationLUTSequence")
    if not tables:
        return (lambda shares: 1 - shares) if inverted else (lambda shares: shares)
    entries, _, bits = lookup_table(tables[0], "LUTDescriptor", "LUTData", name)
    white = 2**bits - 1

    def presented(shares: np.ndarray) -> np.ndarray:
        displayed = looked_up(shares * (len(entries) - 1), entries, 0) / white
        return 1 - displayed if inverted else displayed

    return presented


def mapped_from(data: Any, name: str) -> int | None:
    """The first stored value that a supplemental palette colours (PS3.3 C.8.16.2.1.1.1); None in a
    picture that is grey only.
    """
    if text(data, "PixelPresentation") not in ("COLOR", "MIXED"):
        return None
    descriptor = numbers(data, "RedPaletteColorLookupTableDescriptor", name)
    return None if len(descriptor) != 3 else int(descriptor[1] or 0)
