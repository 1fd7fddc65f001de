"""Turns an image into the numbers a vision tower reads: resized by the model's own rule, normalised
and cut into patches.

Needs only Pillow and numpy, because it runs on the device. It resizes before any runtime does,
since runtimes resize in ways of their own and the features are then another image's.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.tokenizer import encode

if TYPE_CHECKING:
    from PIL import Image

    from edgemed.models.architecture import VisionConfig

KEPT = 32  # images whose features are kept: a few megabytes
NARROWEST = 200  # Qwen2-VL refuses images longer than this many times their width
SQUARE = 400_000_000  # pixels of the largest square an image is padded to: 1.2 GB for a moment


@dataclass(frozen=True)
class Patches:
    """One image as its tower reads it. pixels float32 [rows * columns, numbers of a patch]; rows,
    columns: of patches, before merging.
    """

    pixels: np.ndarray
    rows: int
    columns: int


def fitted_size(width: int, height: int, v: VisionConfig) -> tuple[int, int]:
    """(width, height) to which an image is resized: Qwen2-VL's smart_resize, or the tower's own
    square.

    Raises EdgemedError for an image far longer than wide.
    """
    if max(width, height) > NARROWEST * min(width, height):
        raise EdgemedError(
            f"an image of {width} x {height} pixels is too narrow",
            f"Crop it: at most {NARROWEST} times as long as wide",
        )
    if v.size:
        return v.size, v.size
    unit = v.patch * v.merge
    least, most = v.pixels
    # Python rounds halves to even, as the published rule does.
    w = round(width / unit) * unit
    h = round(height / unit) * unit
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        return max(unit, math.floor(width / shrink / unit) * unit), max(
            unit, math.floor(height / shrink / unit) * unit
        )
    if h * w < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(width * grow / unit) * unit, math.ceil(height * grow / unit) * unit
    return w, h


def resized(image: Image.Image, v: VisionConfig) -> Image.Image:
    """The image at the size its tower reads, bicubic.

    A square tower gets it padded to a square with the mean colour first (LLaVA's expand2square), or
    the middle of it (transformers' CLIP processor).
    """
    pil = need("PIL.Image", "vision")
    size = fitted_size(image.width, image.height, v)
    box = None
    if v.size and v.fit == "crop" and image.width != image.height:
        shortest = min(image.size)
        size = tuple(int(v.size * side / shortest) for side in image.size)
        left, top = ((side - v.size) // 2 for side in size)
        box = (left, top, left + v.size, top + v.size)
    elif v.size and v.fit == "pad" and image.width != image.height:
        side = max(image.size)
        if side**2 > SQUARE:
            raise EdgemedError(
                f"an image of {image.width} x {image.height} pixels cannot be padded to a square",
                f"Reduce it below {math.isqrt(SQUARE)} pixels a side",
            )
        canvas = pil.new("RGB", (side, side), tuple(int(255 * m) for m in v.mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    image = image if image.size == size else image.resize(size, pil.Resampling.BICUBIC)
    return image.crop(box) if box else image


def patches(image: Image.Image, v: VisionConfig) -> Patches:
    """One RGB image as normalised patches, those that are merged into one feature side by side
    (transformers' Qwen2-VL order).
    """
    pixels = np.asarray(resized(image, v), np.float32) / np.float32(255)
    pixels = (pixels - np.array(v.mean, np.float32)) / np.array(v.std, np.float32)
    rows = pixels.shape[0] // v.patch
    columns = pixels.shape[1] // v.patch
    m = v.merge
    p = v.patch
    cut = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    stacked = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], v.temporal, p, p))
    return Patches(
        np.ascontiguousarray(stacked.reshape(rows * columns, v.patch_size)), rows, columns
    )


def axial_positions(found: Patches, v: VisionConfig) -> np.ndarray:
    """(row, column) of each patch in the order of `patches`, int64 [n, 2]."""
    grid = np.stack(np.meshgrid(np.arange(found.rows), np.arange(found.columns), indexing="ij"), -1)
    m = v.merge
    return (
        grid.reshape(found.rows // m, m, found.columns // m, m, 2)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, 2)
    )


def axial_angles(found: Patches, v: VisionConfig) -> np.ndarray:
    """Rotary angles of each patch, float32 [n, pairs of a head]: row times frequencies, then column
    times frequencies.
    """
    at = axial_positions(found, v)[..., None] * np.array(v.frequencies)
    return at.reshape(len(at), -1).astype(np.float32)


def feature_count(found: Patches, v: VisionConfig) -> int:
    """Features, and so tokens, that an image becomes."""
    return found.rows * found.columns // v.merge**2


def most_features(v: VisionConfig) -> int:
    """The most features an image can become under the resize rule."""
    if v.size:
        return (v.size // v.patch) ** 2 // v.merge**2
    least, most = (pixels / (v.patch * v.merge) ** 2 for pixels in v.pixels)
    # Shrinking keeps one unit of the short side, however narrow the image. Growing rounds both
    # sides up, by less than one unit each, and is worst for the narrowest image as well: (a + 1)(b
    # + 1) where ab = least and a / b = NARROWEST.
    grown = least + 1 + math.sqrt(least) * (math.sqrt(NARROWEST) + 1 / math.sqrt(NARROWEST))
    return math.floor(max(1, most, math.sqrt(NARROWEST * most), grown))


def token_positions(
    tokens: Any, token: int, grids: list[tuple[int, int]], parts: int, start: int = 0
) -> np.ndarray:
    """Rotary positions of a prompt, int64 [parts, T], counted from `start`. grids: (rows, columns)
    of features of each image in the prompt.

    One part: positions are plain numbers. Three: an image's features share the first, and count row
    and column in the other two from where the text stood; the text behind goes on after the largest
    (Qwen2-VL's get_rope_index).
    """
    if parts == 1:
        return np.arange(start, start + len(tokens))[None]
    found = np.empty((3, len(tokens)), np.int64)
    at = start
    place = 0
    waiting = list(grids)
    while place < len(tokens):
        if tokens[place] != token:
            found[:, place] = at
            place = place + 1
            at = at + 1
            continue
        rows, columns = waiting.pop(0)
        grid = np.stack(
            np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij")
        ).reshape(3, -1)
        found[:, place : place + rows * columns] = at + grid
        place = place + rows * columns
        at = at + max(rows, columns)
    return found


# features float32 [n, hidden] of one image, and how many (rows, columns) they are
Seen = tuple[np.ndarray, tuple[int, int]]


class Kept:
    """Features of the last few images, found again by their pixels, so that a second question about
    an image costs no second look.
    """

    def __init__(self, compute: Callable[[Image.Image], Seen]):
        self.compute = compute
        self.found: OrderedDict[str, Seen] = OrderedDict()

    def features(self, image: Image.Image) -> Seen:
        """Those of one RGB image, computed where they are not kept."""
        key = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if key not in self.found:
            self.found[key] = self.compute(image)
            if len(self.found) > KEPT:
                self.found.popitem(last=False)
        self.found.move_to_end(key)
        return self.found[key]


def placed(
    tokens: Sequence[int], seen: Sequence[Seen], v: VisionConfig, parts: int, context: int
) -> tuple[list[int], ImageEmbeddings | None]:
    """(tokens with every image token repeated for its image's features, the features themselves).

    tokens: a prompt with one image token for each image, in order; seen: what the images became.
    Raises EdgemedError where prompt and images are longer than the context: an image is never cut.
    """
    if not seen:
        return list(tokens), None
    counts = iter([len(features) for features, _ in seen])
    found = []
    for token in tokens:
        found += [token] * (next(counts) if token == v.token else 1)
    if len(found) > context:
        most = max(len(features) for features, _ in seen)
        raise EdgemedError(
            f"prompt and images are {len(found)} tokens long, {context} fit (the largest image"
            f" alone is {most})",
            "Ask with fewer or smaller images, or export with a longer context",
        )
    positions = token_positions(found, v.token, [grid for _, grid in seen], parts)
    return found, ImageEmbeddings(
        np.concatenate([features for features, _ in seen]), positions, v.token
    )


def prompt_tokens(tokenizer: Any, text: str, v: VisionConfig | None) -> list[int]:
    """Token ids of a prompt to a model that sees: those every prompt starts with, then the text,
    with the image token wherever the marker stands.

    Where the tokenizer has no token for the marker, the texts around it are encoded one by one
    (LLaVA's tokenizer_image_token). v None: a text model.
    """
    if v is None or not v.marker:
        return encode(tokenizer, text)
    first, *others = [text] if tokenizer.token_to_id(v.marker) == v.token else text.split(v.marker)
    found = [*v.start, *encode(tokenizer, first)]
    for piece in others:
        found += [v.token, *encode(tokenizer, piece)]
    return found


def check_places(tokens: Sequence[int], token: int, images: int) -> None:
    """Raise EdgemedError where a prompt has more or fewer places for images than there are
    images.
    """
    places = sum(t == token for t in tokens)
    if places != images:
        raise EdgemedError(
            f"the prompt has places for {places} images, {images} were given",
            "Give one image for each place",
        )


def vision_of(facts: Mapping[str, Any]) -> VisionConfig:
    """Vision values as an engine carries them in JSON."""
    from edgemed.models.architecture import VisionConfig

    return VisionConfig(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    )
