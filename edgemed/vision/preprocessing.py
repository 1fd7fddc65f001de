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
from edgemed.models.tokenizer import begin_tokens, encode, encode_context

if TYPE_CHECKING:
    from PIL import Image

    from edgemed.models.architecture import VisionConfig

CACHED_IMAGES = 32  # images whose features are kept: a few megabytes
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
    size = fitted_size(image.width, image.height, v)
    if v.size and image.width != image.height:
        if v.fit == "crop":
            return _cropped(image, v.size)
        if v.fit == "pad":
            image = _padded(image, v)
    return _at_size(image, size)


def _at_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    return image.resize(size, need("PIL.Image", "vision").Resampling.BICUBIC)


def _cropped(image: Image.Image, side: int) -> Image.Image:
    """The middle of an image whose shortest side is resized to `side`."""
    shortest = min(image.size)
    width = int(side * image.width / shortest)
    height = int(side * image.height / shortest)
    left = (width - side) // 2
    top = (height - side) // 2
    return _at_size(image, (width, height)).crop((left, top, left + side, top + side))


def _padded(image: Image.Image, v: VisionConfig) -> Image.Image:
    """The image in the middle of a square of the mean colour."""
    side = max(image.size)
    if side**2 > SQUARE:
        raise EdgemedError(
            f"an image of {image.width} x {image.height} pixels cannot be padded to a square",
            f"Reduce it below {math.isqrt(SQUARE)} pixels a side",
        )
    colour = tuple(int(255 * mean) for mean in v.mean)
    canvas = need("PIL.Image", "vision").new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def patches(image: Image.Image, v: VisionConfig) -> Patches:
    """One RGB image as normalised patches, those that are merged into one feature side by side
    (transformers' Qwen2-VL order).
    """
    colours: np.ndarray = np.asarray(resized(image, v), np.float32) / np.float32(255)
    pixels = (colours - np.array(v.mean, np.float32)) / np.array(v.std, np.float32)
    m = v.merge
    p = v.patch
    rows = pixels.shape[0] // p
    columns = pixels.shape[1] // p
    # The two axes of the picture as six: which group of m x m patches, which patch in it, and which
    # pixel in that. Then come the colours.
    split = pixels.reshape(rows // m, m, p, columns // m, m, p, 3)
    # Group row, group column, patch row, patch column; a patch itself is colour, pixel row, pixel
    # column. So the patches of one group follow each other.
    ordered = split.transpose(0, 3, 1, 4, 6, 2, 5)
    # A still image is every frame of its film: one more axis behind the colour.
    film = np.broadcast_to(ordered[:, :, :, :, :, None], (*ordered.shape[:5], v.temporal, p, p))
    flat = film.reshape(rows * columns, v.patch_size)
    return Patches(
        pixels=np.ascontiguousarray(flat),
        rows=rows,
        columns=columns,
    )


def axial_positions(image: Patches, v: VisionConfig) -> np.ndarray:
    """(row, column) of each patch in the order of `patches`, int64 [n, 2]."""
    rows = np.arange(image.rows)
    columns = np.arange(image.columns)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    m = v.merge
    # As in `patches`: the positions of one group of m x m patches follow each other.
    split = grid.reshape(image.rows // m, m, image.columns // m, m, 2)
    return split.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def axial_angles(image: Patches, v: VisionConfig) -> np.ndarray:
    """Rotary angles of each patch, float32 [n, pairs of a head]: row times frequencies, then column
    times frequencies.
    """
    angles = axial_positions(image, v)[..., None] * np.array(v.frequencies)
    return angles.reshape(len(angles), -1).astype(np.float32)


def feature_count(image: Patches, v: VisionConfig) -> int:
    """Features, and so tokens, that an image becomes."""
    return image.rows * image.columns // v.merge**2


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
    positions = np.empty((3, len(tokens)), np.int64)
    position = start
    index = 0
    waiting = list(grids)
    while index < len(tokens):
        if tokens[index] != token:
            positions[:, index] = position
            index += 1
            position += 1
            continue
        rows, columns = waiting.pop(0)
        count = rows * columns
        # Of every feature (0, row, column): it shares the first part with the whole image.
        axes = np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij")
        positions[:, index : index + count] = position + np.stack(axes).reshape(3, -1)
        index += count
        position += max(rows, columns)
    return positions


# features float32 [n, hidden] of one image, and how many (rows, columns) they are
EncodedImage = tuple[np.ndarray, tuple[int, int]]


class FeatureCache:
    """Features of the last few images by a digest of their pixels. A second question about an image
    does not encode it again.
    """

    def __init__(self, encode_image: Callable[[Image.Image], EncodedImage]):
        self.encode_image = encode_image
        self.entries: OrderedDict[str, EncodedImage] = OrderedDict()

    def features(self, image: Image.Image) -> EncodedImage:
        """Those of one RGB image, computed where the cache has none."""
        key = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if key not in self.entries:
            self.entries[key] = self.encode_image(image)
            if len(self.entries) > CACHED_IMAGES:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        return self.entries[key]


def placed(
    tokens: Sequence[int],
    encoded: Sequence[EncodedImage],
    v: VisionConfig,
    parts: int,
    context: int,
) -> tuple[list[int], ImageEmbeddings | None]:
    """(tokens with every image token repeated for its image's features, the features themselves).

    tokens: a prompt with one image token for each image, in order; encoded: what the images became.
    Raises EdgemedError where prompt and images are longer than the context: an image is never cut.
    """
    if not encoded:
        return list(tokens), None
    counts = iter([len(features) for features, _ in encoded])
    placed_tokens: list[int] = []
    for token in tokens:
        count = next(counts) if token == v.token else 1
        placed_tokens += [token] * count
    if len(placed_tokens) > context:
        most = max(len(features) for features, _ in encoded)
        raise EdgemedError(
            f"prompt and images are {len(placed_tokens)} tokens long, {context} fit (the largest"
            f" image alone is {most})",
            "Ask with fewer or smaller images, or export with a longer context",
        )
    grids = [grid for _, grid in encoded]
    positions = token_positions(placed_tokens, v.token, grids, parts)
    features = np.concatenate([features for features, _ in encoded])
    return placed_tokens, ImageEmbeddings(features, positions, v.token)


def prompt_tokens(
    tokenizer: Any, text: str, v: VisionConfig | None, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a prompt to a vision model: those every prompt starts with, then the text,
    with the image token wherever the marker stands.

    Where the tokenizer has no token for the marker, the texts around it are encoded one by one
    (LLaVA's tokenizer_image_token). v None: a text model. add_special_tokens: False leaves the
    begin tokens out.
    """
    if v is None or not v.marker:
        return encode_context(tokenizer, text, add_special_tokens)
    first, *others = [text] if tokenizer.token_to_id(v.marker) == v.token else text.split(v.marker)
    start = (v.start or begin_tokens(tokenizer)) if add_special_tokens else ()
    tokens = [*start, *encode(tokenizer, first)]
    for piece in others:
        tokens.append(v.token)
        tokens += encode(tokenizer, piece)
    return tokens


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


def vision_of(facts: Mapping[str, Any] | None) -> VisionConfig:
    """The numbers of a vision tower as an engine's JSON has them, where tuples are lists.

    Raises EdgemedError for an engine of a text model, which has none.
    """
    from edgemed.models.architecture import VisionConfig

    if facts is None:
        raise EdgemedError("this engine reads text only", "Export a vision model")
    values: dict[str, Any] = {}
    for key, value in facts.items():
        values[key] = tuple(value) if isinstance(value, list) else value
    return VisionConfig(**values)
