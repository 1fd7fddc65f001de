"""Reads one picture out of a DICOM file as a scanner's console would show it: modality and window
tables applied, MONOCHROME1 turned over.

A chest radiograph stored the other way round, or a CT slice without its window, looks like another
patient to a model; pydicom knows the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError, need

LARGEST = 200_000_000  # pixels of a picture that is opened at all: more than half a gigabyte as RGB


def read_dicom(path: Path, frame: int = 0) -> np.ndarray:
    """One frame as RGB uint8 [height, width, 3]. Patient data in the header is not read.

    Raises EdgemedError for a damaged file, one without a picture, a frame that is not there, or a
    compression no installed decoder knows.
    """
    pydicom = need("pydicom", "vision")
    from pydicom.errors import InvalidDicomError

    try:
        # force: files of old scanners have no preamble; whether there is a picture is asked below.
        data = pydicom.dcmread(path, force=True, specific_tags=None)
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError) as error:
        raise EdgemedError(
            f"{path} is not a readable DICOM file: {error}", "Export it from the archive again"
        ) from None
    if "PixelData" not in data or "Rows" not in data:
        raise EdgemedError(
            f"{path} is a DICOM file without a picture",
            "Give an image object, not a report or a structured document",
        )
    frames = int(data.get("NumberOfFrames", 1) or 1)
    if not 0 <= frame < frames:
        raise EdgemedError(
            f"{path} has {frames} frames, number {frame} was asked for",
            f"Ask for 0 to {frames - 1}",
        )
    if int(data.Rows) * int(data.Columns) > LARGEST:
        raise EdgemedError(
            f"{path} has {data.Columns} x {data.Rows} pixels",
            f"Reduce it below {LARGEST // 1_000_000} million pixels",
        )
    return _shown(data, _pixels(data, path, frame))


def _pixels(data: Any, path: Path, frame: int) -> np.ndarray:
    """The stored values of one frame, decompressed."""
    from pydicom.pixels import pixel_array

    try:
        return pixel_array(data, index=frame)
    except (RuntimeError, NotImplementedError) as error:
        header = getattr(data, "file_meta", None)
        syntax = getattr(header, "TransferSyntaxUID", None)
        name = syntax.name if syntax else "an unnamed transfer syntax"
        raise EdgemedError(
            f"{path} is compressed as '{name}', which no installed decoder reads",
            "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or export it uncompressed",
        ) from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise EdgemedError(
            f"{path}: its pixels cannot be read: {error}", "Export it from the archive again"
        ) from None


def _shown(data: Any, pixels: np.ndarray) -> np.ndarray:
    from pydicom.pixels import (
        apply_modality_lut,
        apply_voi_lut,
        apply_windowing,
        convert_color_space,
    )

    kind = str(data.get("PhotometricInterpretation", "MONOCHROME2"))
    if pixels.ndim == 3:
        rgb = convert_color_space(pixels, kind, "RGB") if kind.startswith("YBR") else pixels
        if rgb.dtype != np.uint8:
            rgb = stretched(rgb.astype(np.float64))
        return np.ascontiguousarray(rgb)
    if kind == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        return stretched(apply_color_lut(pixels, data).astype(np.float64))
    values = np.asarray(apply_modality_lut(pixels, data), np.float64)
    if "VOILUTSequence" in data:
        grey = stretched(np.asarray(apply_voi_lut(values.astype(np.int64), data), np.float64))
    elif "WindowCenter" in data:
        # A window says which values are black and white, and the picture need not reach both: its
        # ends are what values far outside become.
        low, high = apply_windowing(np.array([-1e12, 1e12]), data)
        windowed = apply_windowing(values, data)
        grey = np.rint((windowed - low) * (255 / (high - low))).astype(np.uint8)
    else:
        grey = stretched(values)
    if kind == "MONOCHROME1":
        # The smallest value is white.
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, -1)


def stretched(grey: np.ndarray) -> np.ndarray:
    """Grey levels of any range as uint8, darkest to 0 and brightest to 255; a flat picture becomes
    black.
    """
    low = float(grey.min())
    high = float(grey.max())
    if high <= low:
        return np.zeros(grey.shape, np.uint8)
    return np.rint((grey - low) * (255 / (high - low))).astype(np.uint8)
