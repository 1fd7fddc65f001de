"""DICOM as a viewer shows it, against pydicom's own tables and the formulas of PS3.3."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pydicom = pytest.importorskip("pydicom")

from dicom_files import compressed, dataset, dicom, item, saved, table
from pydicom import pixels as reference
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from edgemed.errors import EdgemedError
from edgemed.vision.dicom import DicomFile, read_dicom
from edgemed.vision.image_io import open_frames, open_image

RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
TWELVE = {"BitsStored": 12, "HighBit": 11}


def grey(path: Path, frame: int = 0) -> np.ndarray:
    """Levels of one frame, which must be grey."""
    shown = read_dicom(path, frame).astype(int)
    assert (shown == shown[..., :1]).all()
    return shown[..., 0]


def windowed(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, white 255."""
    shares = (values.astype(float) - (centre - 0.5)) / (width - 1) + 0.5
    return 255 * np.clip(shares, 0, 1)


def near(found: np.ndarray, expected: np.ndarray, levels: float = 1) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(float) - expected).max() <= levels


# -- pydicom's own files -----------------------------------------------------------------------


def pydicom_shows(data: Any) -> np.ndarray:
    """Frame 0 through pydicom's functions, RGB as floats 0 to 255."""
    values = reference.pixel_array(data, index=0)
    kind = data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        colours = reference.apply_color_lut(values, data)
        return colours.astype(float) / (256 if colours.dtype == np.uint16 else 1)
    if values.ndim == 3:
        return values.astype(float) * (255 / (2**data.BitsStored - 1))
    levels = reference.apply_modality_lut(values, data).astype(float)
    low = levels.min()
    high = levels.max()
    if "WindowCenter" in data:
        low, high = reference.apply_windowing(np.array([-1e12, 1e12]), data)
        levels = reference.apply_windowing(levels, data)
    shares = (levels - low) / max(high - low, 1e-9)
    shares = 1 - shares if kind == "MONOCHROME1" else shares
    return np.repeat(255 * shares[..., None], 3, -1)


# Decoders of pydicom's list refuse them too: a truncated file, and a JPEG of 12 bits and a JPEG
# 2000 whose data is damaged.
UNREADABLE = {
    "MR_truncated.dcm",
    "JPEG-lossy.dcm",
    "JPEG2000-embedded-sequence-delimiter.dcm",
    "badVR.dcm",
}


def test_pydicoms_own_files_are_right_or_one_line() -> None:
    pytest.importorskip("pylibjpeg")
    pytest.importorskip("libjpeg")
    pytest.importorskip("openjpeg")
    import pydicom.data

    shown = 0
    refused: dict[str, str] = {}
    for file in sorted(Path(pydicom.data.__file__).parent.rglob("*.dcm")):
        try:
            with open(file, "rb") as handle:
                found = DicomFile(handle, file.name).frame().pixels
        except EdgemedError as error:
            refused[file.name] = str(error)
            continue
        shown += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(file)
            expected = pydicom_shows(data)
        assert np.abs(found - expected).max() <= 1, file.name
    assert shown == 70
    assert not any("\n" in message for message in refused.values())
    pictures = {name for name, text in refused.items() if "without a picture" not in text}
    assert pictures == UNREADABLE


# -- grey --------------------------------------------------------------------------------------


def test_a_window_of_each_function(tmp_path: Path) -> None:
    whole = RAMP.astype(float)
    functions = {
        None: windowed(RAMP, 2000, 1000),
        "LINEAR": windowed(RAMP, 2000, 1000),
        "LINEAR_EXACT": 255 * np.clip((whole - 2000) / 1000 + 0.5, 0, 1),
        "SIGMOID": 255 / (1 + np.exp(-4 * (whole - 2000) / 1000)),
    }
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    for function, expected in functions.items():
        file = dicom(tmp_path / "a.dcm", RAMP, **TWELVE, **window, VOILUTFunction=function)
        near(grey(file), expected)
    file = dicom(tmp_path / "a.dcm", RAMP, **TWELVE, **window, VOILUTFunction="GAMMA")
    with pytest.raises(EdgemedError, match="VOILUTFunction 'GAMMA' is not known"):
        open_image(file)


WHOLE = RAMP / 4080 * 255
WINDOWS = {
    "the first of several": (([1000, 40], [500, 400]), windowed(RAMP, 1000, 500)),
    "the first whole one of several": ((["", 40], ["", 400]), windowed(RAMP, 40, 400)),
    "empty": ((None, None), WHOLE),
    "centre only": ((1000, None), WHOLE),
    "width only": ((None, 1000), WHOLE),
    "width 0": ((1000, 0), WHOLE),
    "a linear width below 1": ((1000, 0.5), WHOLE),
    "width 1 is a threshold": ((1000, 1), 255.0 * (RAMP > 999.5)),
    "negative width": ((1000, -400), WHOLE),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_as_archives_have_them(tmp_path: Path, name: str) -> None:
    (centre, width), expected = WINDOWS[name]
    data = dataset(RAMP, **TWELVE, WindowCenter=centre, WindowWidth=width)
    near(grey(saved(tmp_path / "a.dcm", data)), expected, 2)


RESCALES = {
    "both": ({"RescaleSlope": 2, "RescaleIntercept": -1024}, RAMP.astype(float) * 2 - 1024),
    "an intercept alone": ({"RescaleIntercept": -1024}, RAMP.astype(float) - 1024),
    "empty": ({"RescaleSlope": None, "RescaleIntercept": None}, RAMP),
    "a negative slope": ({"RescaleSlope": -1, "RescaleIntercept": 0}, -RAMP.astype(float)),
}


@pytest.mark.parametrize("name", RESCALES)
def test_rescales_as_archives_have_them(tmp_path: Path, name: str) -> None:
    tags, values = RESCALES[name]
    file = dicom(tmp_path / "a.dcm", RAMP, **TWELVE, **tags, WindowCenter=40, WindowWidth=400)
    near(grey(file), windowed(values, 40, 400))


def test_monochrome1_and_inverse_turn_over_once(tmp_path: Path) -> None:
    window = {**TWELVE, "WindowCenter": 2000, "WindowWidth": 1000}
    upright = windowed(RAMP, 2000, 1000)
    for kind, shape, expected in (
        ("MONOCHROME1", None, 255 - upright),
        ("MONOCHROME1", "INVERSE", 255 - upright),
        ("MONOCHROME2", "INVERSE", 255 - upright),
        ("MONOCHROME2", "IDENTITY", upright),
    ):
        tags = {"PhotometricInterpretation": kind, "PresentationLUTShape": shape}
        near(grey(dicom(tmp_path / "a.dcm", RAMP, **window, **tags)), expected)


def test_tables_of_modality_voi_and_presentation(tmp_path: Path) -> None:
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    squares = [n * n for n in range(40)]
    file = dicom(tmp_path / "a.dcm", stored, ModalityLUTSequence=[table(squares, 10)])
    data = pydicom.dcmread(file)
    values = reference.apply_modality_lut(stored, data).astype(float)
    near(grey(file), values / values.max() * 255)
    # Values outside a table take its first or last entry.
    assert (grey(file)[0] == 0).all()
    falling = [4095 - 64 * n for n in range(64)]
    voi = table(falling, bits=12)
    file = dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[voi], WindowCenter=5, WindowWidth=5)
    values = reference.apply_voi_lut(stored, pydicom.dcmread(file)).astype(float)
    near(grey(file), values / 4095 * 255)
    # Some writers describe 16 bits where the entries have 12.
    voi.LUTDescriptor = [64, 0, 16]
    near(grey(dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[voi])), values / 4095 * 255)
    half = table([n // 2 for n in range(256)], bits=8)
    file = dicom(
        tmp_path / "a.dcm",
        stored,
        WindowCenter=32,
        WindowWidth=64,
        PresentationLUTSequence=[half],
    )
    near(grey(file), windowed(stored, 32, 64) / 2)


def test_tables_that_describe_nothing_are_refused(tmp_path: Path) -> None:
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    short = table([1, 2, 3])
    short.LUTDescriptor = [64, 0, 16]
    odd = table([1, 2, 3], bits=40)
    for sequence in ("ModalityLUTSequence", "VOILUTSequence", "PresentationLUTSequence"):
        with pytest.raises(EdgemedError, match="LUTData has 3 entries, its descriptor says 64"):
            open_image(dicom(tmp_path / "a.dcm", stored, **{sequence: [short]}))
        with pytest.raises(EdgemedError, match="LUTDescriptor .* describes no table"):
            open_image(dicom(tmp_path / "a.dcm", stored, **{sequence: [odd]}))
    assert open_image(dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[])).size == (8, 8)


def test_padding_does_not_take_part_in_the_range(tmp_path: Path) -> None:
    stored = RAMP.astype(np.int16)
    stored[:, :8] = -2000
    tags = {"PixelPaddingValue": -2000}
    found = grey(dicom(tmp_path / "a.dcm", stored, **tags))
    assert (found[:, :8] == 0).all()
    inside = stored[:, 8:].astype(float)
    near(found[:, 8:], (inside - inside.min()) / (inside.max() - inside.min()) * 255)
    limit = {"PixelPaddingValue": -3000, "PixelPaddingRangeLimit": -1000}
    assert np.array_equal(grey(dicom(tmp_path / "b.dcm", stored, **limit)), found)


def test_bits_that_are_not_used_do_not_count(tmp_path: Path) -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    expected = windowed(RAMP, 2000, 1000)
    dirty = RAMP | 0xF000
    near(grey(dicom(tmp_path / "a.dcm", dirty, **TWELVE, **window)), expected)
    # In the upper bits of a word, as the standard once allowed.
    high = {"BitsStored": 12, "HighBit": 15}
    near(grey(dicom(tmp_path / "b.dcm", RAMP << 4 | 7, **high, **window)), expected)
    signed = np.arange(-128, 128, dtype=np.int16).reshape(16, 16)
    tags = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 0, "WindowWidth": 200}
    near(grey(dicom(tmp_path / "c.dcm", signed & 0x0FFF, **tags)), windowed(signed, 0, 200))


def test_float_pixels_and_wide_integers(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32) / 7
    data = dataset(values)
    del data.PixelData, data.PixelRepresentation, data.BitsStored, data.HighBit
    data.FloatPixelData = values.tobytes()
    data.WindowCenter = 200
    data.WindowWidth = 100
    near(grey(saved(tmp_path / "a.dcm", data)), windowed(values, 200, 100))
    values[3, 3] = np.nan
    data.FloatPixelData = values.tobytes()
    with pytest.raises(EdgemedError, match="1 of 256 pixels are no finite numbers"):
        open_image(saved(tmp_path / "a.dcm", data))
    wide = RAMP.astype(np.uint32) << 16
    near(grey(dicom(tmp_path / "b.dcm", wide)), WHOLE)


# -- frames ------------------------------------------------------------------------------------


def enhanced(film: np.ndarray, windows: list[Any], shared: Any | None = None) -> Any:
    """An enhanced multi-frame object with one window, or None, for each frame."""
    groups = []
    for window in windows:
        group = item()
        if window is not None:
            centre, width = window
            group.FrameVOILUTSequence = [item(WindowCenter=centre, WindowWidth=width)]
        groups.append(group)
    tags = {"PerFrameFunctionalGroupsSequence": groups}
    if shared is not None:
        tags["SharedFunctionalGroupsSequence"] = [shared]
    return dataset(film, **TWELVE, **tags)


def test_each_frame_has_its_own_window(tmp_path: Path) -> None:
    film = np.stack([RAMP, RAMP[::-1], RAMP.T])
    rescale = item(RescaleSlope=1, RescaleIntercept=-1000)
    shared = item(
        PixelValueTransformationSequence=[rescale],
        FrameVOILUTSequence=[item(WindowCenter=1500, WindowWidth=600)],
    )
    data = enhanced(film, [(0, 500), None, (2000, 1000)], shared)
    data.WindowCenter, data.WindowWidth = 40, 400  # never for an enhanced object
    file = saved(tmp_path / "a.dcm", data)
    for number, (centre, width) in enumerate([(0, 500), (1500, 600), (2000, 1000)]):
        near(grey(file, number), windowed(film[number] - 1000.0, centre, width))
    with open(file, "rb") as handle:
        assert DicomFile(handle, "a").frame(2).how == "window 2000, width 1000"


def test_frames_are_chosen_or_all_shown_and_never_one_in_silence(tmp_path: Path) -> None:
    film = np.stack([RAMP, RAMP[::-1], RAMP.T])
    file = dicom(tmp_path / "film.dcm", film)
    shown = open_frames(file, None, several=True)
    assert len(shown) == 3
    for number, image in enumerate(shown):
        assert np.array_equal(np.asarray(image), read_dicom(file, number))
        assert np.array_equal(
            np.asarray(open_frames(file, number, several=False)[0]), np.asarray(image)
        )
    with pytest.raises(EdgemedError, match="3 frames, and this model reads one.*from 0 to 2"):
        open_frames(file, None, several=False)
    for number in (3, -1):
        with pytest.raises(EdgemedError, match=f"has 3 frames, number {number} was asked"):
            open_frames(file, number, several=True)
    many = dicom(tmp_path / "many.dcm", np.zeros((300, 1, 4), np.uint8))
    with pytest.raises(EdgemedError, match="more than 256 frames, too many"):
        open_frames(many, None, several=True)


# -- colour ------------------------------------------------------------------------------------

COLOURS = np.zeros((16, 16, 3), np.uint8)
for number, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 200, 40))):
    row, column = 8 * (number // 2), 8 * (number % 2)
    COLOURS[row : row + 8, column : column + 8] = colour


def jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "JPEG", quality=95, subsampling=0, **options)
    return buffer.getvalue()


def wavelet() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "JPEG2000", no_jp2=True, irreversible=False, mct=1)
    return buffer.getvalue()


def declared(stream: bytes, transform: int) -> bytes:
    """A JPEG with Adobe's segment, which says how its colours were transformed."""
    start = stream.index(b"\xff\xdb")
    segment = b"Adobe\0d\0\0\0\0" + bytes([transform])
    marker = b"\xff\xee" + (len(segment) + 2).to_bytes(2, "big")
    # Without the JFIF segment, which says YCbCr.
    return stream[:2] + marker + segment + stream[start:]


def colour_files() -> dict[str, Any]:
    ybr = reference.convert_color_space(COLOURS, "RGB", "YBR_FULL")
    halved = np.empty((16, 8, 4), np.uint8)
    halved[..., 0], halved[..., 1] = ybr[:, ::2, 0], ybr[:, 1::2, 0]
    halved[..., 2], halved[..., 3] = ybr[:, ::2, 1], ybr[:, ::2, 2]
    deep = COLOURS.astype(np.uint16) * 257
    tags = {"PhotometricInterpretation": "YBR_FULL"}
    subsampled = {"PhotometricInterpretation": "YBR_FULL_422"}
    planes = COLOURS.transpose(2, 0, 1)
    plain = jpeg()
    return {
        "RGB": dataset(COLOURS),
        "RGB without a planar configuration": dataset(COLOURS, PlanarConfiguration=None),
        "RGB by planes": dataset(COLOURS, PixelData=planes.tobytes(), PlanarConfiguration=1),
        "RGB of 16 bits": dataset(deep),
        "RGB of 12 bits": dataset(deep >> 4, **TWELVE),
        "YBR_FULL": dataset(ybr, **tags),
        "YBR_FULL of 16 bits": dataset(ybr.astype(np.uint16) * 256, **tags),
        "YBR_FULL_422": dataset(COLOURS, **subsampled, PixelData=halved.tobytes()),
        "JPEG, YBR_FULL_422": compressed(COLOURS, [plain], JPEGBaseline8Bit, **subsampled),
        "JPEG, YBR_FULL": compressed(COLOURS, [plain], JPEGBaseline8Bit, **tags),
        "JPEG that says it is YCbCr, header RGB": compressed(COLOURS, [plain], JPEGBaseline8Bit),
        "JPEG of RGB": compressed(COLOURS, [jpeg(keep_rgb=True)], JPEGBaseline8Bit),
        "JPEG declared YCbCr": compressed(
            COLOURS, [declared(plain, 1)], JPEGBaseline8Bit, **subsampled
        ),
        "JPEG declared YCbCr, header RGB": compressed(
            COLOURS, [declared(plain, 1)], JPEGBaseline8Bit
        ),
        "JPEG declared RGB, header YBR": compressed(
            COLOURS,
            [declared(jpeg(keep_rgb=True), 0)],
            JPEGBaseline8Bit,
            **subsampled,
        ),
        "JPEG 2000, YBR_RCT": compressed(
            COLOURS, [wavelet()], JPEG2000Lossless, PhotometricInterpretation="YBR_RCT"
        ),
    }


@pytest.mark.parametrize("plugin", ["all decoders", "Pillow alone"])
def test_colours_come_out_as_put_in(
    tmp_path: Path, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plugin == "Pillow alone":
        from pydicom.pixels.decoders import base

        for decoder in (base.JPEGBaseline8BitDecoder, base.JPEG2000LosslessDecoder):
            only = {"pillow": decoder._available["pillow"]}
            monkeypatch.setattr(decoder, "_available", only)
    for name, data in colour_files().items():
        found = read_dicom(saved(tmp_path / "a.dcm", data)).astype(int)
        assert np.abs(found - COLOURS).max() <= 12, name


def test_a_dark_frame_of_16_bits_stays_dark(tmp_path: Path) -> None:
    dark = COLOURS.astype(np.uint16) * 25
    found = read_dicom(dicom(tmp_path / "a.dcm", dark))
    near(found, dark / 257)


def palette_tags(tables: np.ndarray, first: int = 0, bits: int = 16) -> dict[str, object]:
    tags: dict[str, object] = {}
    for name, entries in zip(("Red", "Green", "Blue"), tables, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(entries) % 65536, first, bits]
        tags[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    return tags


def test_palettes(tmp_path: Path) -> None:
    numbers = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colours = np.random.default_rng(0).integers(0, 100, (3, 50), dtype=np.uint8)
    expected = colours.T[np.clip(numbers.astype(int) - 5, 0, 49)]
    for entries, bits in (
        (colours.astype(np.uint16) << 8, 16),  # the high byte only
        (colours.astype(np.uint16) * 257, 16),
        (colours.astype(np.uint16), 16),  # the low byte only
        (colours, 8),
        (colours.astype(np.uint16), 8),  # eight bits in words of sixteen
    ):
        tags = palette_tags(entries, 5, bits)
        file = dicom(tmp_path / "a.dcm", numbers, PhotometricInterpretation="PALETTE COLOR", **tags)
        near(read_dicom(file), expected, 0)
    # More entries than a byte counts, each of a byte: indices must not wrap.
    many = np.random.default_rng(1).integers(0, 255, (3, 4096), dtype=np.uint8)
    file = dicom(
        tmp_path / "b.dcm",
        RAMP,
        PhotometricInterpretation="PALETTE COLOR",
        **palette_tags(many, 0, 8),
    )
    near(read_dicom(file), many.T[RAMP], 0)
    with pytest.raises(EdgemedError, match="its palette has no green"):
        tags = {
            "RedPaletteColorLookupTableDescriptor": [4, 0, 8],
            "RedPaletteColorLookupTableData": b"\0\1\2\3",
        }
        open_image(
            dicom(tmp_path / "c.dcm", numbers, PhotometricInterpretation="PALETTE COLOR", **tags)
        )


def test_segmented_palettes(tmp_path: Path) -> None:
    numbers = np.arange(16, dtype=np.uint8).reshape(4, 4)
    # Two entries, a line of four to 60000, then the line once more: eleven entries.
    words = np.array([0, 2, 1000, 20000, 1, 4, 60000, 0, 1, 0, 2, 1, 8, 0], np.uint16)
    line = np.rint(np.linspace(20000, 60000, 5)[1:])
    again = np.rint(np.linspace(0, 60000, 5)[1:])
    expected = np.concatenate([[1000, 20000], line, [0], again])[:11].astype(int) >> 8
    tags: dict[str, object] = {}
    for name in ("Red", "Green", "Blue"):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [11, 0, 16]
        tags[f"Segmented{name}PaletteColorLookupTableData"] = words.tobytes()
    kind = {"PhotometricInterpretation": "PALETTE COLOR"}
    found = read_dicom(dicom(tmp_path / "a.dcm", numbers, **kind, **tags))
    near(found[..., 0], expected[np.clip(numbers, 0, 10)], 0)
    for bad in (
        [1, 4, 60000],
        [7, 1, 1],
        [0, 9, 1],
        [0, 1, 1],
        [2, 0, 0, 0],
        [0, 1, 5, 2, 1, 99, 0],
    ):
        for name in ("Red", "Green", "Blue"):
            tags[f"Segmented{name}PaletteColorLookupTableData"] = np.array(bad, "<u2").tobytes()
        with pytest.raises(EdgemedError, match="PaletteColorLookupTableData"):
            open_image(dicom(tmp_path / "a.dcm", numbers, **kind, **tags))


def test_a_supplemental_palette_colours_what_it_maps(tmp_path: Path) -> None:
    stored = np.arange(128, dtype=np.uint8).reshape(8, 16)
    colours = np.random.default_rng(0).integers(0, 256, (3, 64), dtype=np.uint8)
    tags = palette_tags(colours, 64, 8)
    window = {"WindowCenter": 32, "WindowWidth": 64}
    file = dicom(tmp_path / "a.dcm", stored, PixelPresentation="MIXED", **window, **tags)
    found = read_dicom(file)
    near(found[:4], np.repeat(windowed(stored[:4], 32, 64)[..., None], 3, -1))
    near(found[4:], colours.T[stored[4:].astype(int) - 64], 0)


# -- compressed --------------------------------------------------------------------------------


def test_lossless_compressions_show_the_same(tmp_path: Path) -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    plain = grey(dicom(tmp_path / "a.dcm", RAMP, **TWELVE, **window))
    data = dataset(RAMP, **TWELVE, **window)
    data.compress(RLELossless)
    assert np.array_equal(grey(saved(tmp_path / "rle.dcm", data)), plain)
    buffer = io.BytesIO()
    Image.fromarray(RAMP << 4).save(buffer, "JPEG2000", no_jp2=True, irreversible=False)
    shifted = {"WindowCenter": 32000, "WindowWidth": 16000}
    data = compressed(RAMP, [buffer.getvalue()], JPEG2000Lossless, **shifted)
    near(grey(saved(tmp_path / "wavelet.dcm", data)), plain)


def test_a_compressed_picture_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    small = {"Rows": 8, "PhotometricInterpretation": "YBR_FULL_422"}
    data = compressed(COLOURS, [jpeg()], JPEGBaseline8Bit, **small)
    with pytest.raises(EdgemedError, match="of 16 x 16 pixels, and its header says 16 x 8"):
        open_image(saved(tmp_path / "a.dcm", data))
    # A header of four gigabytes on a frame of a hundred bytes.
    stream = bytearray(jpeg())
    at = stream.index(b"\xff\xc0")
    stream[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    data = compressed(COLOURS, [bytes(stream)], JPEGBaseline8Bit)
    with pytest.raises(EdgemedError, match="of 65535 x 65535 pixels"):
        open_image(saved(tmp_path / "b.dcm", data))


def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from pydicom.pixels.decoders import base

    monkeypatch.setattr(base.JPEGLSLosslessDecoder, "_available", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = compressed(RAMP, [b"\xff\xd8\xff\xf7"], JPEGLSLossless, **TWELVE)
    with pytest.raises(EdgemedError, match=r"JPEG-LS.*pip install 'edgemed\[dicom\]'"):
        open_image(saved(tmp_path / "a.dcm", data))


def test_files_of_old_scanners_and_other_byte_orders(tmp_path: Path) -> None:
    from pydicom.uid import (
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ImplicitVRLittleEndian,
    )

    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    expected = windowed(RAMP, 2000, 1000)
    data = dataset(RAMP, ImplicitVRLittleEndian, **TWELVE, **window)
    bare = saved(tmp_path / "bare.dcm", data).read_bytes()
    # Without preamble and file meta: the header begins with group 8.
    (tmp_path / "old").write_bytes(bare[bare.index(b"\x08\x00\x16\x00") :])
    near(np.asarray(open_image(tmp_path / "old"))[..., 0], expected)
    big = dataset(RAMP.astype(">u2"), ExplicitVRBigEndian, **TWELVE, **window)
    big.set_original_encoding(False, False)
    near(grey(saved(tmp_path / "big.dcm", big)), expected)
    # Words of a table too: as numbers, and as bytes.
    for kind in ("US", "OW"):
        voi = item(LUTDescriptor=[4096, 0, 12])
        rising = np.arange(4096)[::-1]
        words = rising.tolist() if kind == "US" else rising.astype(">u2").tobytes()
        voi.add_new("LUTData", kind, words)
        big.VOILUTSequence = [voi]
        near(grey(saved(tmp_path / "big.dcm", big)), (4095 - RAMP) / 4095 * 255)
    deflated = dataset(RAMP, DeflatedExplicitVRLittleEndian, **TWELVE, **window)
    near(grey(saved(tmp_path / "deflated.dcm", deflated)), expected)


def test_a_deflated_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    from edgemed.vision import dicom as module

    monkeypatch.setattr(module, "LARGEST_FILE", 1_000_000)
    data = dataset(np.zeros((1500, 1500), np.uint8), DeflatedExplicitVRLittleEndian)
    file = saved(tmp_path / "a.dcm", data)
    assert file.stat().st_size < 100_000
    with pytest.raises(EdgemedError, match="more than 1000000 bytes when inflated"):
        open_image(file)


HEADERS: dict[str, tuple[dict[str, object], str]] = {
    "rows beyond the data": ({"Rows": 60000, "Columns": 3000}, "cannot be read: .*bytes"),
    "far too large": ({"Rows": 65535, "Columns": 65535}, "65535 x 65535 pixels"),
    "no rows": ({"Rows": 0}, "16 x 0 pixels"),
    "frames of a gigabyte": (
        {"Rows": 14000, "Columns": 14000, "BitsAllocated": 64, "BitsStored": 64},
        "one frame has 1568000000 bytes",
    ),
    "no interpretation": ({"PhotometricInterpretation": None}, "Photometric Interpretation"),
    "grey and RGB": ({"PhotometricInterpretation": "RGB"}, "one sample per pixel"),
    "CMYK": ({"PhotometricInterpretation": "CMYK"}, "CMYK"),
    "slope 0": ({"RescaleSlope": 0, "RescaleIntercept": 1}, "RescaleSlope 0 makes"),
    "a slope beyond floats": ({"RescaleSlope": "1e400"}, "RescaleSlope is no number"),
    "an unknown shape": ({"PresentationLUTShape": "OD"}, "PresentationLUTShape 'OD'"),
    "an odd word": ({"BitsAllocated": 12}, "Bits Allocated"),
    "too many bits": ({"BitsStored": 20}, "Bits Stored"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_not_understood_are_one_line(tmp_path: Path, name: str) -> None:
    tags, message = HEADERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = dicom(tmp_path / "a.dcm", RAMP, **{**TWELVE, **tags})
    with pytest.raises(EdgemedError, match=message) as caught:
        open_image(file)
    assert "\n" not in str(caught.value)


def test_overlays_are_said_not_to_be_drawn(tmp_path: Path) -> None:
    data = dataset(RAMP, **TWELVE)
    data.add_new((0x6000, 0x3000), "OW", b"\0" * 32)
    with open(saved(tmp_path / "a.dcm", data), "rb") as handle:
        assert DicomFile(handle, "a").frame().how.endswith("overlays are not drawn")
