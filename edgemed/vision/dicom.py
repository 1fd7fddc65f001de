"""Reads frames out of a DICOM file as a viewer shows them: modality and window tables applied,
MONOCHROME1 turned over, colours as RGB.

A chest radiograph stored the other way round, or a CT slice without its window, looks like another
patient to a model. The header is read here; `dicom_pixels` decodes the stored values,
`dicom_greyscale` and `dicom_colour` show them.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.vision import dicom_colour, dicom_greyscale
from edgemed.vision.dicom_header import EXPORT_AGAIN, readable, whole_number
from edgemed.vision.dicom_pixels import LARGEST, decoded_frame, transfer_syntax

LARGEST_FILE = 2_000_000_000  # bytes of a file that is opened at all; deflated ones when inflated
MAGIC = b"DICM"  # behind a preamble of 128 bytes
DEFLATED = "1.2.840.10008.1.2.1.99"


@dataclass(frozen=True)
class DisplayedFrame:
    """pixels: RGB uint8 [height, width, 3]. how: what was applied to the stored values, in words
    ('window 40, width 400').
    """

    pixels: np.ndarray
    how: str


class DicomFile:
    """One DICOM file with a picture. frames: how many it has. Patient data in the header is not
    read.
    """

    def __init__(self, source: BinaryIO, name: str):
        """source: an open file; name: what it is called in errors.

        Raises EdgemedError for a damaged or far too large file, and for one without a picture.
        """
        self.name = name
        self.data = _dataset(source, name)
        with readable(name, "its header"):
            self.frames = max(1, whole_number(self.data, "NumberOfFrames", name) or 1)

    def frame(self, number: int = 0) -> DisplayedFrame:
        """One frame, counted from 0, as a viewer shows it.

        Raises EdgemedError for a frame that is not there, a compression no installed decoder reads,
        damaged pixels, and what the header says about them where it is not understood.
        """
        if not 0 <= number < self.frames:
            raise EdgemedError(
                f"{self.name} has {self.frames} frames, number {number} was asked for",
                f"Ask for 0 to {self.frames - 1}",
            )
        with readable(self.name, "its pixels"):
            stored = decoded_frame(self.data, number, self.frames, self.name)
            if dicom_colour.is_colour(self.data, stored):
                pixels, how = dicom_colour.shown(self.data, stored, self.name)
            else:
                grey, how = dicom_greyscale.shown(self.data, stored, number, self.name)
                colours = dicom_colour.supplemented(self.data, stored, grey, self.name)
                pixels = np.repeat(grey[..., None], 3, -1) if colours is None else colours
            return DisplayedFrame(pixels, how + _not_drawn(self.data))


def read_dicom(path: Path, frame: int = 0) -> np.ndarray:
    """One frame as RGB uint8 [height, width, 3].

    Raises EdgemedError for a damaged file, one without a picture, a frame that is not there, or a
    compression no installed decoder knows.
    """
    with open(path, "rb") as handle:
        return DicomFile(handle, str(path)).frame(frame).pixels


def is_dicom(handle: BinaryIO, name: str) -> bool:
    """Whether an open file is DICOM: by the mark behind its preamble, or by its name where an old
    scanner left the preamble out.
    """
    head = handle.read(132)
    handle.seek(0)
    if head[128:] == MAGIC:
        return True
    # Without the preamble a file begins with group 2 or 8 of its header.
    begins = head[:4] == b"\x02\x00\x00\x00" or (head[:2] == b"\x08\x00" and head[3:4] == b"\x00")
    return begins or Path(name).suffix.lower() in (".dcm", ".dicom")


def _dataset(source: BinaryIO, name: str) -> Any:
    """The file's header and its still compressed pixels, a transfer syntax named."""
    pydicom = need("pydicom", "vision")
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    if size > LARGEST_FILE:
        raise EdgemedError(
            f"{name} has {size} bytes",
            f"Extract the frames you need: at most {LARGEST_FILE // 1_000_000} million bytes",
        )
    with readable(name, "its header", "is not a readable DICOM file"):
        _check_inflated_size(source, name)
        # force: files of old scanners have no preamble; whether there is a picture is asked below.
        data = pydicom.dcmread(source, force=True)
        pixels = any(f"{kind}PixelData" in data for kind in ("", "Float", "DoubleFloat"))
        if not pixels or "Rows" not in data:
            raise EdgemedError(
                f"{name} is a DICOM file without a picture",
                "Give an image object, not a report or a structured document",
            )
        rows = whole_number(data, "Rows", name) or 0
        columns = whole_number(data, "Columns", name) or 0
        if rows < 1 or columns < 1:
            raise EdgemedError(f"{name} has a picture of {columns} x {rows} pixels", EXPORT_AGAIN)
        if rows * columns > LARGEST:
            raise EdgemedError(
                f"{name} has {columns} x {rows} pixels",
                f"Reduce it below {LARGEST // 1_000_000} million pixels",
            )
        transfer_syntax(data, name)
    return data


def _check_inflated_size(source: BinaryIO, name: str) -> None:
    """Raise EdgemedError for a deflated file that is far too large inflated."""
    from pydicom.filereader import read_preamble

    if not read_preamble(source, True):
        source.seek(0)
        return
    from pydicom.filereader import _read_file_meta_info

    meta = _read_file_meta_info(source)
    if str(meta.get("TransferSyntaxUID", "")) == DEFLATED:
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        total = 0
        while block := source.read(1 << 16):
            while block:
                total += len(stream.decompress(block, 1 << 24))
                block = stream.unconsumed_tail
                if total > LARGEST_FILE:
                    raise EdgemedError(
                        f"{name} has more than {LARGEST_FILE} bytes when inflated",
                        "Export it from the archive uncompressed",
                    )
    source.seek(0)


def _not_drawn(data: Any) -> str:
    """What a viewer may draw over the picture, and a model does not see."""
    overlays = any((group, 0x3000) in data for group in range(0x6000, 0x6020, 2))
    return "; overlays are not drawn" if overlays else ""
