"""Images: the published resize rule and patch order, every kind of file a person may give, and
DICOM as a console shows it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from edgemed.errors import EdgemedError
from edgemed.models.architecture import VisionConfig
from edgemed.vision.image_io import open_image
from edgemed.vision.preprocessing import (
    axial_positions,
    feature_count,
    fitted_size,
    patches,
    token_positions,
)

SEES = VisionConfig(
    width=32,
    layers=1,
    heads=2,
    ffn=64,
    norm_eps=1e-6,
    activation="quick_gelu",
    patch=14,
    projector_hidden=128,
    token=9,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    temporal=2,
    merge=2,
    pixels=(3136, 12544),
    frequencies=(1.0, 0.1, 0.01, 0.001),
)
SIZES = [
    (60, 60),
    (100, 37),
    (333, 200),
    (20, 90),
    (1, 1),
    (28, 28),
    (3000, 20),
    (56, 57),
    (1024, 1024),
]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_transformers(size: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    process = module.Qwen2VLImageProcessorPil(min_pixels=SEES.pixels[0], max_pixels=SEES.pixels[1])
    right = process(images=[noise(*size)], return_tensors="np")
    found = patches(noise(*size), SEES)
    assert right["image_grid_thw"].tolist() == [[1, found.rows, found.columns]]
    assert np.array_equal(found.pixels, right["pixel_values"])


def test_an_image_far_longer_than_wide_is_refused() -> None:
    with pytest.raises(EdgemedError, match="4020 x 20 pixels is too narrow"):
        fitted_size(4020, 20, SEES)


def test_a_square_tower_gets_a_padded_square() -> None:
    square = replace(SEES, size=28, merge=1, temporal=1)
    found = patches(Image.new("RGB", (40, 10), "white"), square)
    assert (found.rows, found.columns, found.pixels.shape) == (2, 2, (4, 588))
    # The first row of pixels is padding: the mean colour, which is nearly zero after normalisation;
    # the middle is white.
    assert abs(found.pixels[0, 0]) < 0.02
    assert found.pixels.max() > 1.5


def test_positions_of_patches_and_of_tokens() -> None:
    found = patches(noise(56, 84), SEES)
    assert feature_count(found, SEES) == found.rows * found.columns // 4
    assert axial_positions(found, SEES)[:5].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    # Two of text, an image of 2 x 3 features, one of text: the image starts at 2 and the text
    # behind it at 2 + 3.
    placed = token_positions([1, 1, *[9] * 6, 1], 9, [(2, 3)], 3)
    assert placed[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5]
    assert placed[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5]
    assert placed[2].tolist() == [
        0,
        1,
        2,
        3,
        4,
        2,
        3,
        4,
        5,
    ]
    assert token_positions([1, 9, 1], 9, [(1, 1)], 1, start=4).tolist() == [[4, 5, 6]]


def saved(folder: Path, name: str, image: Image.Image, **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_every_kind_of_file_becomes_rgb(tmp_path: Path) -> None:
    colour = noise(30, 20)
    assert np.array_equal(
        np.asarray(open_image(saved(tmp_path, "a.png", colour))), np.asarray(colour)
    )
    for name in ("a.jpg", "a.tiff", "a.bmp"):
        assert open_image(saved(tmp_path, name, colour)).size == (30, 20)
    assert open_image(saved(tmp_path, "cmyk.jpg", colour.convert("CMYK"))).mode == "RGB"
    clear = open_image(saved(tmp_path, "clear.png", Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    # As transformers' load_image: transparency is dropped.
    assert clear.getpixel((0, 0)) == (255, 0, 0)
    ramp = Image.fromarray(np.linspace(1000, 3000, 256).astype(np.uint16).reshape(16, 16))
    grey = np.asarray(open_image(saved(tmp_path, "deep.png", ramp)))
    assert (grey.min(), grey.max()) == (0, 255)
    assert np.array_equal(grey[..., 0], grey[..., 2])
    frames = [Image.new("P", (5, 5), shade) for shade in (10, 200)]
    assert open_image(
        saved(tmp_path, "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    ).size == (5, 5)
    assert open_image(saved(tmp_path, "dot.png", Image.new("RGB", (1, 1)))).size == (1, 1)


def test_what_is_no_image_ends_in_one_line(tmp_path: Path) -> None:
    good = saved(tmp_path, "good.png", noise(64, 64))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("a table of values")
    for name, said in (
        ("cut.png", "is damaged"),
        ("empty.png", "is empty"),
        ("text.png", "is not an image"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(EdgemedError, match=said):
            open_image(tmp_path / name)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    import tracemalloc

    # 30,000 x 30,000 black pixels are a file of about a hundred kilobytes.
    bomb = saved(tmp_path, "bomb.png", Image.new("1", (30_000, 30_000)))
    tracemalloc.start()
    with pytest.raises(EdgemedError, match="30000 x 30000 pixels|far too many pixels"):
        open_image(bomb)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def dicom(path: Path, pixels: np.ndarray, **tags: object) -> Path:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset(
        str(path),
        {},
        file_meta=meta,
        preamble=b"\0" * 128,
    )
    frames = pixels.ndim == 3 and pixels.shape[-1] != 3
    facts = {
        "Rows": pixels.shape[-2 if pixels.shape[-1] != 3 or pixels.ndim == 2 else 0],
        "Columns": pixels.shape[-1 if pixels.shape[-1] != 3 or pixels.ndim == 2 else 1],
        "SamplesPerPixel": 3 if pixels.ndim == 3 and not frames else 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": 8 * pixels.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
        **({"NumberOfFrames": len(pixels)} if frames else {}),
        **({"PlanarConfiguration": 0} if pixels.ndim == 3 and not frames else {}),
        **tags,
    }
    for name, value in facts.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    assert pydicom
    return path


def test_dicom_is_shown_through_its_window(tmp_path: Path) -> None:
    # Stored 0..400 with intercept -200: Hounsfield -200..200; a window of 100 around 0 blackens
    # what is below -50 and whitens what is above 50.
    stored = np.arange(0, 400, dtype=np.int16).reshape(20, 20)
    file = dicom(
        tmp_path / "ct.dcm",
        stored,
        RescaleSlope=1,
        RescaleIntercept=-200,
        WindowCenter=0,
        WindowWidth=100,
    )
    shown = np.asarray(open_image(file))[..., 0].astype(int).reshape(-1)
    assert shown[:149].max() == 0
    assert shown[251:].min() == 255
    assert abs(shown[200] - 128) <= 2
    assert (np.diff(shown) >= 0).all()


def test_monochrome1_is_turned_over(tmp_path: Path) -> None:
    stored = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    plain, turned = (
        np.asarray(
            open_image(dicom(tmp_path / f"{kind}.dcm", stored, PhotometricInterpretation=kind))
        ).astype(int)
        for kind in ("MONOCHROME2", "MONOCHROME1")
    )
    assert np.array_equal(plain + turned, np.full(plain.shape, 255))
    assert plain[0, 0, 0] == 0


def test_colour_and_several_frames(tmp_path: Path) -> None:
    from edgemed.vision.dicom import read_dicom

    colour = np.asarray(noise(6, 5))
    assert np.array_equal(
        np.asarray(
            open_image(dicom(tmp_path / "rgb.dcm", colour, PhotometricInterpretation="RGB"))
        ),
        colour,
    )
    film = np.stack([np.full((4, 4), 10, np.uint8), np.arange(16, dtype=np.uint8).reshape(4, 4)])
    file = dicom(tmp_path / "film.dcm", film)
    assert read_dicom(file, 1).max() == 255
    assert read_dicom(file, 0).max() == 0
    with pytest.raises(EdgemedError, match="has 2 frames, number 2 was asked for"):
        read_dicom(file, 2)


def test_dicom_without_a_picture_or_a_decoder(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    file = dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint8))
    data = pydicom.dcmread(file)
    del data.PixelData
    data.save_as(tmp_path / "report.dcm")
    with pytest.raises(EdgemedError, match="without a picture"):
        open_image(tmp_path / "report.dcm")
    (tmp_path / "noise.dcm").write_bytes(b"no dicom at all")
    with pytest.raises(EdgemedError, match="without a picture|not a readable DICOM"):
        open_image(tmp_path / "noise.dcm")
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    data = pydicom.dcmread(file)
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    data.PixelData = encapsulate([b"\xff\x4f\xff\x51 not decodable"])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "packed.dcm")
    with pytest.raises(EdgemedError, match="JPEG 2000|cannot be read"):
        open_image(tmp_path / "packed.dcm")
