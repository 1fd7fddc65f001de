"""Pictures as transformers' load_image makes them, and what it makes wrong in silence: grey levels
beyond 255, values that are no numbers, frames.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from edgemed.errors import EdgemedError
from edgemed.vision.image_io import Album, open_frames, open_image

ORIENTATION = 0x0112
LEFT_RED = np.zeros((40, 60, 3), np.uint8)
LEFT_RED[:, :20, 0] = 255
LEFT_RED[5:9, 30:, 1] = 200


def right(path: Path) -> np.ndarray:
    utilities = pytest.importorskip("transformers.image_utils")
    return np.asarray(utilities.load_image(str(path)), int)


def levels(path: Path, frame: int = 0) -> np.ndarray:
    return np.asarray(open_image(path, frame), int)


def saved(path: Path, image: Any, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_photographs_are_upright(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(LEFT_RED)
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    for number in range(1, 10):
        exif = image.getexif()
        exif[ORIENTATION] = number
        options = lossless.get(kind, {})
        file = saved(tmp_path / f"{number}.{kind}", image, exif=exif, **options)
        expected = right(file)
        assert expected.shape[:2] == ((60, 40) if 5 <= number <= 8 else (40, 60))
        assert np.array_equal(levels(file), expected), number


def colour_modes() -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    clear = Image.fromarray(noise)
    indexed = clear.convert("RGB").quantize(16)
    see_through = indexed.copy()
    see_through.info["transparency"] = bytes(range(0, 256, 16))
    hole = indexed.copy()
    hole.info["transparency"] = 3
    return {
        "RGB": clear.convert("RGB"),
        "RGBA": clear,
        "L": clear.convert("L"),
        "LA": clear.convert("LA"),
        "1": clear.convert("1"),
        "P": indexed,
        "P with an alpha": see_through,
        "P with a hole": hole,
    }


@pytest.mark.parametrize("mode", colour_modes())
def test_colour_modes_as_load_image(tmp_path: Path, mode: str) -> None:
    image = colour_modes()[mode]
    file = saved(tmp_path / "a.png", image)
    assert np.array_equal(levels(file), right(file))


def test_formats_as_load_image(tmp_path: Path) -> None:
    image = Image.fromarray(LEFT_RED)
    for name in ("a.bmp", "a.gif", "a.jp2", "a.ppm", "a.tga", "a.webp", "a.tiff", "a.jpg"):
        file = saved(tmp_path / name, image)
        assert np.array_equal(levels(file), right(file)), name
    for name in ("cmyk.jpg", "cmyk.tiff"):
        file = saved(tmp_path / name, image.convert("CMYK"))
        assert np.array_equal(levels(file), right(file)), name
    file = saved(tmp_path / "lab.tiff", Image.merge("LAB", image.split()))
    assert np.array_equal(levels(file), right(file))


def test_names_with_odd_characters(tmp_path: Path) -> None:
    for name in ("röntgen 1.png", "a;b&c$(d).png", "-rf.png", "läs\nt.png", "x.PNG", "no suffix"):
        file = saved(tmp_path / name, Image.fromarray(LEFT_RED), format="PNG")
        assert np.array_equal(levels(file), LEFT_RED), name
    for name in ("", ".", str(tmp_path), "none.png", "a\0b.png", "http://example.org/a.png"):
        with pytest.raises(EdgemedError, match="does not exist"):
            open_image(name)


DEEP = {
    "16 bits, a range": (np.array([[1000, 3000], [2000, 1000]], np.uint16), [0, 255, 128, 0]),
    "16 bits, flat": (np.full((2, 2), 30000, np.uint16), [117] * 4),
    "16 bits, black": (np.zeros((2, 2), np.uint16), [0] * 4),
    "16 bits, white": (np.full((2, 2), 65535, np.uint16), [255] * 4),
    "32 bits, a range": (np.array([[-70000, 70000], [0, 0]], np.int32), [0, 255, 128, 128]),
    "32 bits, flat": (np.full((2, 2), 65535, np.int32), [255] * 4),
    "floats, a range": (np.array([[0, 1], [0.25, 0.5]], np.float32), [0, 255, 64, 128]),
    "floats of 1, flat": (np.full((2, 2), 0.5, np.float32), [128] * 4),
    "floats of 255, flat": (np.full((2, 2), 100, np.float32), [100] * 4),
    "floats below 0, flat": (np.full((2, 2), -3, np.float32), [0] * 4),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_levels(tmp_path: Path, name: str) -> None:
    values, expected = DEEP[name]
    file = saved(tmp_path / "a.tiff", Image.fromarray(values))
    found = levels(file)
    assert (found == found[..., :1]).all()
    assert found[..., 0].reshape(-1).tolist() == expected
    if values.dtype == np.uint16:
        assert np.array_equal(levels(saved(tmp_path / "a.png", Image.fromarray(values))), found)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    values[1, 2:] = value
    file = saved(tmp_path / "a.tiff", Image.fromarray(values))
    with pytest.raises(EdgemedError, match="2 of 16 pixels are no finite numbers"):
        open_image(file)


@pytest.mark.parametrize("name", ["film.gif", "film.png", "film.webp", "film.tiff"])
def test_frames_of_animations_and_pages(tmp_path: Path, name: str) -> None:
    grey = [Image.new("RGB", (6, 4), (shade, shade, shade)) for shade in (10, 120, 250)]
    options = {"lossless": True} if name.endswith("webp") else {}
    file = saved(tmp_path / name, grey[0], save_all=True, append_images=grey[1:], **options)
    shades = [int(np.asarray(image)[0, 0, 0]) for image in open_frames(file, None, True)]
    assert shades == [10, 120, 250]
    assert levels(file, 2)[0, 0].tolist() == [250, 250, 250]
    assert np.array_equal(levels(file), right(file))
    with pytest.raises(EdgemedError, match="3 frames, and this model reads one image.*0 to 2"):
        open_frames(file, None, several=False)
    for number in (3, -1):
        with pytest.raises(EdgemedError, match=f"has no frame {number}"):
            open_image(file, number)


def test_previews_and_other_sizes_are_no_frames(tmp_path: Path) -> None:
    image = Image.fromarray(LEFT_RED)
    phone = saved(
        tmp_path / "a.mpo", image, format="MPO", save_all=True, append_images=[image.resize((9, 9))]
    )
    icon = saved(tmp_path / "a.ico", image, sizes=[(16, 16), (32, 32)])
    for file in (phone, icon):
        assert len(open_frames(file, None, several=False)) == 1


def test_a_film_of_a_million_frames_is_not_counted(tmp_path: Path) -> None:
    two = [Image.new("P", (1, 1), shade) for shade in (0, 1)]
    file = saved(tmp_path / "a.gif", two[0], save_all=True, append_images=two[1:], duration=9)
    data = file.read_bytes()
    frame = data[data.rindex(b"!\xf9") : -1]
    file.write_bytes(data[:-1] + frame * 200_000 + b";")
    with pytest.raises(EdgemedError, match="more than 256 frames"):
        open_frames(file, None, several=True)


def test_rows_choose_a_frame_of_a_film(tmp_path: Path) -> None:
    grey = [Image.new("RGB", (6, 4), (shade, shade, shade)) for shade in (10, 250)]
    saved(tmp_path / "film.gif", grey[0], save_all=True, append_images=grey[1:])
    saved(tmp_path / "one.png", grey[0])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "film.gif", "packed.gif")
    for name in ("film.gif", "packed.gif"):
        with pytest.raises(EdgemedError, match="2 frames, and its row names it as one"):
            Album(tmp_path, "all.zip").open(name)
        for frame, shade in ((0, 10), (1, 250)):
            album = Album(tmp_path, "all.zip", frame)
            assert np.asarray(album.open(name))[0, 0, 0] == shade
            assert np.asarray(album.open("one.png"))[0, 0, 0] == 10


def test_zip_members_may_be_dicom(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from dicom_files import dicom

    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    file = dicom(tmp_path / "a.dcm", values, PhotometricInterpretation="MONOCHROME1")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(file, "packed")
    found = Album(tmp_path, "all.zip").open("packed")
    assert np.array_equal(np.asarray(found), np.asarray(open_image(file)))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    stream = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        stream += len(body).to_bytes(4, "big") + kind + body
        stream += zlib.crc32(kind + body).to_bytes(4, "big")
    return stream


def header(width: int, height: int, depth: int = 8, colour: int = 0) -> tuple[bytes, bytes]:
    sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"IHDR", sizes + bytes([depth, colour, 0, 0, 0])


HOSTILE = {
    "no size": (png(header(0, 5), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")), "damaged|knows"),
    "far too large": (png(header(60000, 60000), (b"IDAT", b""), (b"IEND", b"")), "pixels"),
    "a side of two billion": (png(header(2**31 - 1, 1), (b"IDAT", b"")), "pixels|damaged"),
    "no data": (png(header(5, 5), (b"IEND", b"")), "damaged"),
    "a palette that is not there": (
        png(header(2, 2, 8, 3), (b"IDAT", zlib.compress(b"\0\1\2" * 2)), (b"IEND", b"")),
        "",
    ),
    "a text of fifty megabytes": (
        png(
            header(1, 1),
            (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 50_000_000)),
            (b"IDAT", zlib.compress(b"\0\0")),
            (b"IEND", b""),
        ),
        "is damaged: Decompressed data too large",
    ),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "knows"),
    "EXIF that is none": (
        png(
            header(1, 1),
            (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff\x01\x12"),
            (b"IDAT", zlib.compress(b"\0\0")),
            (b"IEND", b""),
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_right_or_one_line(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "a.png").write_bytes(data)
    if message:
        with pytest.raises(EdgemedError, match=message):
            open_image(tmp_path / "a.png")
    else:
        assert open_image(tmp_path / "a.png").mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000"])
def test_half_a_file_is_one_line(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(LEFT_RED).save(buffer, kind)
    data = buffer.getvalue()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(EdgemedError, match="is damaged"):
        open_image(tmp_path / "cut")
