"""Opens image files as a person gives them, within bounded memory: PNG, JPEG, TIFF and what else
Pillow reads, and DICOM.

Every file a hospital exports goes through here, so what is damaged, far too large or no image at
all ends in one clear line.
"""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.vision.dicom import LARGEST, read_dicom, stretched

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: str | Path) -> Image.Image:
    """An RGB image from PNG, JPEG, TIFF or another format Pillow reads, or from DICOM.

    Sixteen-bit grey levels are stretched to the range they use; of an animated file the first
    picture is taken. Raises EdgemedError for a missing, empty, damaged or far too large file.
    """
    path = Path(path)
    if not path.is_file():
        raise EdgemedError(f"image {path} does not exist", "Give a PNG, JPEG, TIFF or DICOM file")
    if is_dicom(path):
        return need("PIL.Image", "vision").fromarray(read_dicom(path))
    with open(path, "rb") as handle:
        return decoded(handle, str(path))


def decoded(handle: BinaryIO, path: str) -> Image.Image:
    """The same from an open file that is no DICOM. path: what it is called in errors."""
    pil = need("PIL.Image", "vision")
    try:
        with warnings.catch_warnings():
            # Our own bound is checked below, before a pixel is decoded.
            warnings.simplefilter("ignore", pil.DecompressionBombWarning)
            image = pil.open(handle)
            if image.width * image.height > LARGEST:
                raise EdgemedError(
                    f"image {path} has {image.width} x {image.height} pixels",
                    f"Reduce it below {LARGEST // 1_000_000} million pixels",
                )
            image.load()
    except pil.UnidentifiedImageError:
        what = "is empty" if handle.seek(0, io.SEEK_END) == 0 else "is not an image Pillow knows"
        raise EdgemedError(f"image {path} {what}", "Give a PNG, JPEG, TIFF or DICOM file") from None
    except pil.DecompressionBombError:
        raise EdgemedError(
            f"image {path} has far too many pixels",
            f"Reduce it below {LARGEST // 1_000_000} million pixels",
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        # what Pillow's decoders raise for damaged files
        raise EdgemedError(f"image {path} is damaged: {error}", "Copy it again") from None
    return rgb(image)


def is_dicom(path: Path) -> bool:
    """DICOM files carry DICM behind a preamble of 128 bytes; files of old scanners without it go by
    their name.
    """
    with open(path, "rb") as handle:
        return handle.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB: 16- and 32-bit grey stretched to 8 bits, transparency on white, CMYK
    and palettes converted.
    """
    pil = need("PIL.Image", "vision")
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return pil.fromarray(stretched(np.asarray(image, np.float64))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


class Album:
    """The images of a task by the names its rows give them: files beside the rows' file, or members
    of one zip file beside it.
    """

    def __init__(self, folder: Path, archive: str = ""):
        """archive: name of the zip file in `folder`, '' for none. Raises EdgemedError where it is
        damaged.
        """
        self.folder = Path(folder)
        self.archive = Path(folder) / archive if archive else None
        self.opened: zipfile.ZipFile | None = None
        self.members: set[str] = set()
        if self.archive and self.archive.is_file():
            try:
                self.opened = zipfile.ZipFile(self.archive)
                self.members = set(self.opened.namelist())
            except (zipfile.BadZipFile, OSError) as error:
                raise EdgemedError(f"{self.archive} is damaged: {error}", "Copy it again") from None

    def has(self, name: str) -> bool:
        """Whether there is such an image; a name that leads out of the folder names none."""
        return (
            not Path(name).is_absolute()
            and ".." not in Path(name).parts
            and ((self.folder / name).is_file() or name in self.members)
        )

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises EdgemedError where there is none, or it cannot be read."""
        if not self.has(name):
            raise EdgemedError(
                f"image '{name}' is not in {self.folder}", "Put it beside the rows' file"
            )
        try:
            if (self.folder / name).is_file():
                return (self.folder / name).read_bytes()
            # `has` has found it, so it is a member of the archive.
            archive = self.opened
            if archive is None:
                raise RuntimeError(f"{name} is neither a file nor a member of an archive")
            size = archive.getinfo(name).file_size
            if size > LARGEST:
                raise EdgemedError(
                    f"image {name} in {self.archive} has {size} bytes",
                    f"Reduce it below {LARGEST // 1_000_000} million",
                )
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise EdgemedError(
                f"image {name} in {self.folder} cannot be read: {error}", "Copy it again"
            ) from None

    def open(self, name: str) -> Image.Image:
        """RGB, as open_image; a DICOM file must lie beside the rows' file. Raises EdgemedError for
        a missing or damaged image.
        """
        beside = self.folder / name
        if self.has(name) and beside.is_file():
            return open_image(beside)
        return decoded(io.BytesIO(self.read(name)), name)
