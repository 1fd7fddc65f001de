"""Damaged and hostile image files: a picture or one line, never another exception.

Mutations of small files of every kind: odd values in a DICOM header, and flipped, cut and inserted
bytes in headers, compressed data and pictures.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pydicom = pytest.importorskip("pydicom")

from dicom_files import compressed, dataset, item, table
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.pixels import convert_color_space
from pydicom.tag import Tag
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from edgemed.errors import EdgemedError
from edgemed.vision.image_io import read_frames

NOISE = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
KEYWORDS = [
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "NumberOfFrames",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "RescaleSlope",
    "RescaleIntercept",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PresentationLUTShape",
    "PixelPresentation",
    "RedPaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "VOILUTSequence",
    "ModalityLUTSequence",
    "PresentationLUTSequence",
    "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
]
VALUES = (
    b"|0|-1|1e400|nan|inf|abc |1\\2\\3 |\\|400\\|\\400|0.0000001 |1e308 |-1e308|99999999999999999999"
    b"|RGB |YBR_FULL|YBR_RCT |YBR_PARTIAL_422 |PALETTE COLOR |MONOCHROME1 |SIGMOID |LINEAR_EXACT"
    b"|INVERSE |MIXED |\xff\xff|\0\0|\1\0|\3\0|\x10\0\0\0\x10\0|\0\0\0\0\x08\0|\1\0\0\0\x10\0"
    b"|\xfe\xff\0\xe0\xff\xff\xff\xff"
).split(b"|")
REPRESENTATIONS = ("", "US", "SS", "DS", "IS", "CS", "OB", "OW", "UN", "FD", "SQ")


def shown(data: bytes, name: str, frame: int | None, several: bool) -> None:
    """A file that opens gives RGB images; one that does not, one line of moderate length."""
    message = ""
    try:
        images = read_frames(io.BytesIO(data), name, frame, several)
    except EdgemedError as error:
        images = []
        message = str(error)
    assert all(image.mode == "RGB" for image in images)
    assert "\n" not in message
    assert len(message) < 700


@functools.cache
def dicom_files() -> tuple[bytes, ...]:
    """One small file of each kind of pixels."""
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "JPEG")
    wavelet = io.BytesIO()
    Image.fromarray(NOISE).save(wavelet, "JPEG2000", no_jp2=True, irreversible=False, mct=1)
    kinds = {"PhotometricInterpretation": "PALETTE COLOR"}
    for channel in ("Red", "Green", "Blue"):
        kinds[f"{channel}PaletteColorLookupTableDescriptor"] = [16, 0, 8]
        kinds[f"{channel}PaletteColorLookupTableData"] = bytes(range(16))
    window = {"WindowCenter": [40, 50], "WindowWidth": [400, 300]}
    run_lengths = dataset(RAMP)
    run_lengths.compress(RLELossless)
    groups = [item(FrameVOILUTSequence=[item(WindowCenter=n, WindowWidth=9)]) for n in range(2)]
    data_sets = [
        dataset(RAMP, BitsStored=12, HighBit=11, **window),
        dataset(RAMP, ModalityLUTSequence=[table([1, 2, 3])], VOILUTSequence=[table([3, 2, 1])]),
        dataset(np.stack([RAMP, RAMP]), PerFrameFunctionalGroupsSequence=groups),
        dataset(
            convert_color_space(NOISE, "RGB", "YBR_FULL"), PhotometricInterpretation="YBR_FULL"
        ),
        dataset(np.arange(16, dtype=np.uint8).reshape(4, 4), **kinds),
        run_lengths,
        compressed(
            NOISE, [buffer.getvalue()], JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422"
        ),
        compressed(
            NOISE, [wavelet.getvalue()], JPEG2000Lossless, PhotometricInterpretation="YBR_RCT"
        ),
    ]
    files = []
    for data in data_sets:
        buffer = io.BytesIO()
        data.save_as(buffer, enforce_file_format=True)
        files.append(buffer.getvalue())
    return tuple(files)


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """One small file of each format, mode and kind of frames."""
    image = Image.fromarray(NOISE)
    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        (kind, image, {})
        for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000", "PPM", "TGA", "ICO")
    ]
    kinds += [("TIFF", image, {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate")]
    kinds += [("PNG", image.convert(mode), {}) for mode in ("1", "P", "LA", "RGBA")]
    kinds += [("TIFF", image.convert("L").convert(mode), {}) for mode in ("I;16", "F")]
    exif = image.getexif()
    exif[0x0112] = 6
    kinds += [("JPEG", image, {"exif": exif, "progressive": True})]
    film = {"save_all": True, "append_images": [image.rotate(90)]}
    kinds += [(kind, image, film) for kind in ("GIF", "PNG", "TIFF", "WEBP")]
    files = []
    for kind, picture, options in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return tuple(files)


def damaged(data: bytes, edits: list[tuple[float, int]], end: float, inserted: bytes) -> bytes:
    """Bytes set at shares of the length, some more inserted at the first, and the end cut off."""
    changed = bytearray(data)
    for place, value in edits:
        # Headers lie at the beginning: half of the edits go there.
        share = place**3 if value % 2 else place
        changed[int(share * len(changed))] = value
    if edits and inserted:
        at = int(edits[0][0] * len(changed))
        changed[at:at] = inserted
    return bytes(changed[: max(1, int(end * len(changed)))])


FRAME = st.sampled_from((None, 0, 1))
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
)
END = st.sampled_from((1.0, 1.0, 1.0, 0.97, 0.5, 0.1))


@settings(max_examples=250)
@given(
    which=st.integers(0, 7),
    attributes=st.dictionaries(
        st.sampled_from(KEYWORDS),
        st.tuples(st.sampled_from(VALUES), st.sampled_from(REPRESENTATIONS)),
        min_size=1,
        max_size=3,
    ),
    frame=FRAME,
    several=st.booleans(),
)
def test_odd_values_in_a_dicom_header(
    which: int, attributes: dict[str, tuple[bytes, str]], frame: int | None, several: bool
) -> None:
    data = pydicom.dcmread(io.BytesIO(dicom_files()[which]))
    for keyword, (value, representation) in attributes.items():
        tag = Tag(tag_for_keyword(keyword))
        kind = representation or dictionary_VR(tag).split()[0]
        data._dict[tag] = RawDataElement(tag, kind, len(value), value, 0, False, True)
    buffer = io.BytesIO()
    try:
        data.save_as(buffer)
    except Exception:
        # pydicom does not write it; then no file has it in this form.
        return
    shown(buffer.getvalue(), "a.dcm", frame, several)


@settings(max_examples=250)
@given(
    which=st.integers(0, 7),
    edits=EDITS,
    end=END,
    inserted=st.binary(max_size=4),
    frame=FRAME,
)
def test_damaged_dicom(
    which: int, edits: list[tuple[float, int]], end: float, inserted: bytes, frame: int | None
) -> None:
    shown(damaged(dicom_files()[which], edits, end, inserted), "a.dcm", frame, True)


@settings(max_examples=250)
@given(
    which=st.integers(0, len(pictures()) - 1),
    edits=EDITS,
    end=END,
    inserted=st.binary(max_size=4),
    frame=FRAME,
)
def test_damaged_pictures(
    which: int, edits: list[tuple[float, int]], end: float, inserted: bytes, frame: int | None
) -> None:
    shown(damaged(pictures()[which], edits, end, inserted), "a.png", frame, True)


@settings(max_examples=250)
@given(data=st.binary(max_size=400), name=st.sampled_from(("a.dcm", "a.png")))
def test_bytes_that_are_no_image(data: bytes, name: str) -> None:
    shown(data, name, None, True)


def test_a_name_of_no_file_is_one_line(tmp_path: Path) -> None:
    from edgemed.vision.image_io import open_image

    for name in ("\ud800.png", "x" * 5000, str(tmp_path / ("y" * 300))):
        with pytest.raises(EdgemedError, match="does not exist"):
            open_image(name)
