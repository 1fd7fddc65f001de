"""Opens image files as a person gives them, within bounded memory: PNG, JPEG, TIFF and what else
Pillow reads, and DICOM.

Every file a hospital exports goes through here, so what is damaged, far too large or no image at
all ends in one clear line. Pictures become what transformers' load_image makes of them; deeper grey
levels, which it cuts off at 255, are stretched instead.
"""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.vision.dicom import DicomFile, is_dicom
from edgemed.vision.dicom_greyscale import BLOCK
from edgemed.vision.dicom_pixels import LARGEST

if TYPE_CHECKING:
    from PIL import Image

GIVE_IMAGE = "Give a PNG, JPEG, TIFF or DICOM file"
MOST_FRAMES = 256  # of one file that are shown to a model together
# Pillow hands EPS to Ghostscript, a program that runs what the file says.
REFUSED_FORMATS = {"EPS", "WMF"}
# Formats whose further pictures are no frames: previews, gain maps, layers, other sizes.
SINGLE_FORMATS = {"MPO", "PSD", "ICO", "ICNS"}
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
# What says how a picture was made of its file, in Image.info
HOW = "edgemed"


def open_image(path: str | Path, frame: int = 0) -> Image.Image:
    """One RGB image from PNG, JPEG, TIFF or another format Pillow reads, or from DICOM, upright.

    frame: counted from 0, of a file with several. Sixteen-bit grey levels are stretched to the
    range they use. Raises EdgemedError for a missing, empty, damaged or far too large file, and for
    a frame it does not have.
    """
    with _opened(path) as handle:
        return read_image(handle, str(path), frame)


def open_frames(path: str | Path, frame: int | None, several: bool) -> list[Image.Image]:
    """The RGB images that a model sees of one file.

    frame: the one to take, None for all. several: whether the model reads several images. Raises
    EdgemedError as open_image, and for a file of several frames of which a model that reads one
    image was given none.
    """
    with _opened(path) as handle:
        return read_frames(handle, str(path), frame, several)


def read_frames(handle: BinaryIO, name: str, frame: int | None, several: bool) -> list[Image.Image]:
    """As open_frames, from an open file. name: what it is called in errors."""
    if frame is not None:
        return [read_image(handle, name, frame)]
    count = frame_count(handle, name)
    if count > 1 and not several:
        raise EdgemedError(
            f"{name} has {_many(count)} frames, and this model reads one image",
            f"Say which with --frame, from 0 to {_many(count, -1)}",
        )
    if count > MOST_FRAMES:
        raise EdgemedError(
            f"{name} has {_many(count)} frames, too many to show together",
            f"Say which with --frame, or give a file of at most {MOST_FRAMES}",
        )
    return [read_image(handle, name, n) for n in range(count)]


def _many(count: int, offset: int = 0) -> str:
    """A number of frames in words: they are not counted beyond MOST_FRAMES."""
    return f"more than {MOST_FRAMES}" if count > MOST_FRAMES else str(count + offset)


def frame_count(handle: BinaryIO, name: str) -> int:
    """Frames of an open image file; MOST_FRAMES + 1 where a picture format has more.

    Raises EdgemedError for a damaged file.
    """
    handle.seek(0)
    if is_dicom(handle, name):
        return DicomFile(handle, name).frames
    with _pillow(handle, name) as image:
        if image.format in SINGLE_FORMATS or not getattr(image, "is_animated", False):
            return 1
        count = 0
        try:
            # Counted one by one: a GIF may have millions, each of a few bytes.
            for count in range(1, MOST_FRAMES + 1):
                image.seek(count)
        except EOFError:
            return count
        return count + 1


def read_image(handle: BinaryIO, name: str, frame: int = 0) -> Image.Image:
    """As open_image, from an open file. name: what it is called in errors."""
    handle.seek(0)
    if is_dicom(handle, name):
        displayed = DicomFile(handle, name).frame(frame)
        picture = need("PIL.Image", "vision").fromarray(displayed.pixels)
        picture.info[HOW] = displayed.how
        return picture
    with _pillow(handle, name) as image:
        _seek(image, frame, name)
        image.load()
        # As a viewer and load_image show it: cameras store which side is up beside the picture.
        upright = need("PIL.ImageOps", "vision").exif_transpose(image)
        return rgb(upright, name)


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    if not _is_file(Path(path)):
        raise EdgemedError(f"image {str(path)[:300]} does not exist", GIVE_IMAGE)
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise EdgemedError(
                f"image {path} cannot be read: {error.strerror}", "Check its permissions"
            ) from None
        yield handle


def _is_file(path: Path) -> bool:
    """Whether there is such a file. No name is an error: one of 5,000 characters names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def _pillow(handle: BinaryIO, name: str) -> Iterator[Any]:
    """A file opened by Pillow and not decoded yet; whatever its plug-ins raise is one line."""
    pil = need("PIL.Image", "vision")
    pil.init()
    try:
        with warnings.catch_warnings():
            # Our own bound is checked below, before a pixel is decoded.
            warnings.simplefilter("ignore")
            handle.seek(0)
            image = pil.open(handle, formats=sorted(set(pil.OPEN) - REFUSED_FORMATS))
            if image.width * image.height > LARGEST:
                raise EdgemedError(
                    f"image {name} has {image.width} x {image.height} pixels",
                    f"Reduce it below {LARGEST // 1_000_000} million pixels",
                )
            yield image
    except EdgemedError:
        raise
    except pil.UnidentifiedImageError:
        what = "is empty" if handle.seek(0, io.SEEK_END) == 0 else "is not an image Pillow knows"
        raise EdgemedError(f"image {name} {what}", GIVE_IMAGE) from None
    except pil.DecompressionBombError:
        raise EdgemedError(
            f"image {name} has far too many pixels",
            f"Reduce it below {LARGEST // 1_000_000} million pixels",
        ) from None
    except Exception as error:
        # Pillow's plug-ins raise OSError, SyntaxError, struct.error, KeyError and more for damaged
        # files.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise EdgemedError(f"image {name} is damaged: {reason}", "Copy it again") from None


def _seek(image: Any, frame: int, name: str) -> None:
    if frame == 0:
        return
    try:
        if frame < 0 or image.format in SINGLE_FORMATS:
            raise EOFError
        image.seek(frame)
    except EOFError:
        raise EdgemedError(
            f"image {name} has no frame {frame}", "Frames are counted from 0"
        ) from None
    if image.width * image.height > LARGEST:
        raise EdgemedError(
            f"image {name} has {image.width} x {image.height} pixels",
            f"Reduce it below {LARGEST // 1_000_000} million pixels",
        )


def rgb(image: Image.Image, name: str) -> Image.Image:
    """Any Pillow image as RGB, as load_image does: transparency is dropped, CMYK and palettes are
    converted. 16- and 32-bit grey is stretched to 8 bits.

    Raises EdgemedError for values that are not finite, and for a colour mode without RGB.
    """
    if image.mode in DEEP_MODES:
        pixels = np.asarray(image)
        levels, how = stretched(pixels, name)
        grey = need("PIL.Image", "vision").fromarray(levels)
        converted = grey.convert("RGB")
        converted.info[HOW] = how
        return converted
    try:
        return image.convert("RGB")
    except ValueError:
        raise EdgemedError(
            f"image {name} has the colours {image.mode}, which have no RGB here",
            "Save it as RGB",
        ) from None


def stretched(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """(grey levels of any range as uint8, darkest to 0 and brightest to 255, that in words).

    A flat picture has no range: it keeps its share of the whole one, 1 for floats up to 1, 255 or
    65535. Raises EdgemedError for values that are not finite.
    """
    if values.dtype.kind == "f":
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            raise EdgemedError(
                f"image {name}: {bad} of {values.size} pixels are no finite numbers",
                "Replace them, for example by the background's level",
            )
    low = float(values.min())
    high = float(values.max())
    how = f"{low:g} is black, {high:g} is white"
    if high <= low:
        low = 0.0
        high = _whole_range(high, values.dtype)
        how = f"flat, {high:g} would be white"
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK // values.shape[1])
    for start in range(0, len(values), rows):
        block = values[start : start + rows].astype(np.float64)
        levels[start : start + rows] = np.rint(np.clip((block - low) / (high - low), 0, 1) * 255)
    return levels, how


def _whole_range(value: float, dtype: np.dtype[Any]) -> float:
    """The white of a flat picture: of 16-bit integers 65535, else the least usual one above it."""
    if dtype.kind == "u":
        return float(np.iinfo(dtype).max)
    usual = (1.0, 255.0, 65535.0) if dtype.kind == "f" else (65535.0,)
    return next((white for white in usual if value <= white), value)


class Album:
    """The images of a task by the names its rows give them: files beside the rows' file, or members
    of one zip file beside it.
    """

    def __init__(self, folder: Path, archive: str = "", frame: int | None = None):
        """archive: name of the zip file in `folder`, '' for none. frame: the one to take, from 0,
        of files that have several. Raises EdgemedError where the archive is damaged.
        """
        self.folder = Path(folder)
        self.archive = Path(folder) / archive if archive else None
        self.opened: zipfile.ZipFile | None = None
        self.members: set[str] = set()
        self.frame = frame
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
            and (_is_file(self.folder / name) or name in self.members)
        )

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises EdgemedError where there is none, or it cannot be read."""
        if not self.has(name):
            raise EdgemedError(
                f"image '{name}' is not in {self.folder}", "Put it beside the rows' file"
            )
        try:
            if _is_file(self.folder / name):
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
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
            # RuntimeError: a member with a password, or packed in a way this Python has no code for
            raise EdgemedError(
                f"image {name} in {self.folder} cannot be read: {error}", "Copy it again"
            ) from None

    def open(self, name: str) -> Image.Image:
        """RGB, as open_image: the album's frame of a file that has several.

        Raises EdgemedError for a missing or damaged image, and for one of several frames where none
        was chosen: a question has one place for it.
        """
        beside = self.folder / name
        if self.has(name) and _is_file(beside):
            with _opened(beside) as handle:
                return self._one(handle, str(beside))
        return self._one(io.BytesIO(self.read(name)), name)

    def _one(self, handle: BinaryIO, name: str) -> Image.Image:
        count = 1 if self.frame == 0 else frame_count(handle, name)
        if count == 1:
            return read_image(handle, name)
        if self.frame is None:
            raise EdgemedError(
                f"{name} has {_many(count)} frames, and its row names it as one image",
                f"Say which with eval --frame, from 0 to {_many(count, -1)}, or give that frame as"
                " a file of its own",
            )
        return read_image(handle, name, self.frame)
