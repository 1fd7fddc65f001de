"""Opens image files as a person gives them, within bounded memory: PNG, JPEG, TIFF and what else Pillow reads, and DICOM.

Every file a hospital exports goes through here, so what is damaged, far too large or no image at all ends in one clear line.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemed.dicom import LARGEST, read_dicom, stretched
from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: str | Path) -> Image.Image:
    """An RGB image from PNG, JPEG, TIFF or another format Pillow reads, or from DICOM.

    Sixteen-bit grey levels are stretched to the range they use; of an animated file the first picture is taken.
    Raises EdgemedError for a missing, empty, damaged or far too large file.
    """
    pil, path = need("PIL.Image", "vision"), Path(path)
    if not path.is_file():
        raise EdgemedError(f"image {path} does not exist", "Give a PNG, JPEG, TIFF or DICOM file")
    if is_dicom(path):
        return pil.fromarray(read_dicom(path))
    try:
        with warnings.catch_warnings():
            # Our own bound is checked below, before a pixel is decoded.
            warnings.simplefilter("ignore", pil.DecompressionBombWarning)
            image = pil.open(path)
            if image.width * image.height > LARGEST:
                raise EdgemedError(f"image {path} has {image.width} x {image.height} pixels", f"Reduce it below {LARGEST // 1_000_000} million pixels")
            image.load()
    except pil.UnidentifiedImageError:
        what = "is empty" if path.stat().st_size == 0 else "is not an image Pillow knows"
        raise EdgemedError(f"image {path} {what}", "Give a PNG, JPEG, TIFF or DICOM file") from None
    except pil.DecompressionBombError:
        raise EdgemedError(f"image {path} has far too many pixels", f"Reduce it below {LARGEST // 1_000_000} million pixels") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for damaged files
        raise EdgemedError(f"image {path} is damaged: {error}", "Copy it again") from None
    return rgb(image)


def is_dicom(path: Path) -> bool:
    """DICOM files carry DICM behind a preamble of 128 bytes; files of old scanners without it go by their name."""
    with open(path, "rb") as handle:
        return handle.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB: 16- and 32-bit grey stretched to 8 bits, transparency on white, CMYK and palettes converted."""
    pil = need("PIL.Image", "vision")
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return pil.fromarray(stretched(np.asarray(image, np.float64))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")
