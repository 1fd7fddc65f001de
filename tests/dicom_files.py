"""Small DICOM files for tests, written with pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

CT = "1.2.840.10008.5.1.4.1.1.2"


def dataset(pixels: np.ndarray, syntax: str | None = None, **tags: object) -> Any:
    """A data set of pixels [rows, columns], [frames, rows, columns] or [rows, columns, 3].

    tags: attributes, None for an empty one. syntax: of the transfer; explicit little endian.
    """
    pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CT
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    film = pixels.ndim == 3 and not colour
    facts = {
        "SOPClassUID": CT,
        "SOPInstanceUID": "1.2.3",
        "Rows": pixels.shape[0 if colour else -2],
        "Columns": pixels.shape[1 if colour else -1],
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": 8 * pixels.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
        **({"NumberOfFrames": len(pixels)} if film else {}),
        **({"PlanarConfiguration": 0} if colour else {}),
        **tags,
    }
    for name, value in facts.items():
        setattr(data, name, value)
    return data


def compressed(pixels: np.ndarray, frames: list[bytes], syntax: str, **tags: object) -> Any:
    """The same with compressed frames. pixels: what they decode to, for the header only."""
    from pydicom.encaps import encapsulate

    data = dataset(pixels, syntax, PixelData=encapsulate(frames), **tags)
    data["PixelData"].is_undefined_length = True
    return data


def saved(path: Path, data: Any) -> Path:
    data.save_as(path, enforce_file_format=True)
    return path


def dicom(path: Path, pixels: np.ndarray, **tags: object) -> Path:
    """A file of `dataset`."""
    return saved(path, dataset(pixels, **tags))


def item(**tags: object) -> Any:
    """One item of a sequence."""
    from pydicom.dataset import Dataset

    found = Dataset()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def table(entries: list[int], first: int = 0, bits: int = 16) -> Any:
    """An item with a lookup table, its data as words."""
    words = np.array(entries, "<u2").tobytes()
    return item(LUTDescriptor=[len(entries), first, bits], LUTData=words)
