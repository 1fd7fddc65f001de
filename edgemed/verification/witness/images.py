"""Pixels of image files: edgemed's beside those of the checkpoint's own image processor in
transformers.

The files are as people have them: turned by an EXIF tag, with a palette, grey.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.documents.witness import WitnessRow
from edgemed.errors import EdgemedError
from edgemed.models.architecture import VisionConfig
from edgemed.models.weights import CanonicalWeights
from edgemed.verification.witness import native, reading, samples
from edgemed.verification.witness.tally import Tally, shortened
from edgemed.verification.witness.texts import first_line
from edgemed.vision.image_io import open_image
from edgemed.vision.preprocessing import Patches

# Float32 arithmetic in another order stays far below, one grey level (0.015 and more) far above.
TOLERANCE = 1e-4
PREPROCESSOR = "preprocessor_config.json"
# Where transformers' reading is not what a hospital needs: (case, reason).
EXCEPTIONS = (
    (
        "grey images of 16 bits",
        "transformers cuts every level above 255 (Pillow's convert), which makes a radiograph"
        " white; edgemed spreads the levels, and only the result is compared",
    ),
    (
        "transparent images",
        "transformers drops the transparency and shows what is stored under it; edgemed puts the"
        " image on white, and they are not compared",
    ),
)


def image_row(weights: CanonicalWeights, config: Any, folder: Path) -> WitnessRow:
    """Pixels of every sample image. config: transformers' config object, None where it has no class
    for the whole model; folder: where image files may be written.
    """
    tally = Tally("images")
    checkpoint = weights.checkpoint
    if config is None:
        tally.note = f"{native.LIBRARY} has no class for this model"
        return tally.row()
    try:
        processor = native.native_image_processor(checkpoint.path)
    except native.REFUSALS as error:
        if (checkpoint.path / PREPROCESSOR).is_file():
            tally.differs(f"{native.LIBRARY} refuses {PREPROCESSOR}: {first_line(error)}")
        else:
            tally.note = f"the checkpoint has no {PREPROCESSOR}"
        return tally.row()
    for kind, file in samples.write_images(folder).items():
        compare_image(tally, weights, processor, kind, (file, native.load_image(file)))
    deep = samples.write_deep_image(folder)
    compare_image(tally, weights, processor, "a grey image of 16 bits", (deep, open_image(deep)))
    return tally.row()


def compare_image(
    tally: Tally, weights: CanonicalWeights, processor: Any, kind: str, image: tuple[Path, Any]
) -> None:
    """Count one image. image: (the file, the same as transformers opens it)."""
    file, opened = image
    vision = weights.require_vision()
    try:
        ours = reading.pixels(weights, file)
    except EdgemedError as error:
        tally.differs(f"{kind}: edgemed refuses it ({error.problem})")
        return
    expected = native_pixels(processor, opened, vision)
    problem = pixel_difference(ours, expected)
    if not problem:
        tally.same()
        return
    cause = pixel_cause(weights, ours, opened)
    tally.differs(f"{kind}: {problem}" if not cause else f"{cause} ({kind}: {problem})")


def native_pixels(processor: Any, image: Any, vision: VisionConfig) -> np.ndarray:
    """Pixels [patches, numbers of a patch] as transformers' processor gives them; whole pictures
    [3, height, width] are cut into patches, row by row.
    """
    values = np.asarray(processor(images=image, return_tensors="np")["pixel_values"], np.float32)
    if values.ndim == 2:
        return values
    *_, colours, height, width = values.shape
    p = vision.patch
    rows = height // p
    columns = width // p
    pixels = values.reshape(colours, height, width)
    cut = pixels[:, : rows * p, : columns * p].reshape(3, rows, p, columns, p)
    return cut.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)


def pixel_difference(ours: Patches, theirs: np.ndarray) -> str:
    """How the pixels differ, '' where they agree."""
    if ours.pixels.shape != theirs.shape:
        return (
            f"{theirs.shape[0]} patches of {theirs.shape[1]} numbers in {native.LIBRARY},"
            f" {ours.pixels.shape[0]} of {ours.pixels.shape[1]} in edgemed"
        )
    error = float(np.abs(ours.pixels - theirs).max())
    return "" if error <= TOLERANCE else f"pixels differ by {error:.3g}"


def pixel_cause(weights: CanonicalWeights, ours: Patches, image: Any) -> str:
    """The key of the preprocessor's file that edgemed does not honour: without it, transformers
    gives edgemed's pixels. '' where there is no such key.
    """
    path = weights.checkpoint.path
    file = path / PREPROCESSOR
    if not file.is_file():
        return ""
    content = json.loads(file.read_text(encoding="utf-8"))
    processor = native.native_image_processor(path)
    for key in content:
        without = {name: value for name, value in content.items() if name != key}
        if _agrees_without(processor, without, ours, image, weights.require_vision()):
            return (
                f"{PREPROCESSOR}: {key} {shortened(content[key])} is honoured by"
                f" {native.LIBRARY} and not by edgemed"
            )
    return ""


def _agrees_without(
    processor: Any, content: Mapping[str, Any], ours: Patches, image: Any, vision: VisionConfig
) -> bool:
    try:
        changed = type(processor)(**content)
        return not pixel_difference(ours, native_pixels(changed, image, vision))
    except native.REFUSALS:
        return False
