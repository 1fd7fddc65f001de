"""Rows of questions about images, as they lie on disk: the rows, their images and their digests.

Nothing is computed here, so a device and `--help` can import this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemed.artifacts import hashing
from edgemed.data.text_sets import read_card, read_jsonl
from edgemed.errors import EdgemedError
from edgemed.vision.image_io import Album


def image_rows(name: str) -> list[dict[str, Any]] | None:
    """Rows {"image" or "images", "question", "answer"} of a .jsonl file.

    None where the first row names no image. Raises EdgemedError naming a row that lacks one of the
    three.
    """
    file = read_card(name).file("calibration")
    if file.suffix != ".jsonl":
        return None
    rows = read_jsonl(file)
    if not rows or not rows[0].keys() & {"image", "images"}:
        return None
    for number, row in enumerate(rows, 1):
        if not _is_image_question(row):
            raise EdgemedError(
                f"{file}: row {number} is no question about an image",
                'Rows look like {"id": .., "image": "name.png", "question": .., "answer": ..}',
            )
    return rows


def _is_image_question(row: dict[str, Any]) -> bool:
    texts = [row.get("question"), row.get("answer")]
    return bool(images_of(row)) and all(isinstance(text, str) and text for text in texts)


def images_of(row: dict[str, Any]) -> list[str]:
    """Names of the images of one row; none where the row's entry is not a list of names."""
    names = row.get("images", [row.get("image")])
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return []


def images_album(name: str) -> Album:
    """The images of a set: files beside its rows, or members of the zip file its card names."""
    card = read_card(name)
    archive = card.files["images"].name if "images" in card.files else ""
    return Album(card.file("calibration").parent, archive)


def images_digest(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """sha256 over the images' bytes, in the rows' order. Raises EdgemedError for an image that is
    missing.
    """
    album = images_album(name)
    digests = []
    for row in rows:
        for image in images_of(row):
            digests.append(hashlib.sha256(album.read(image)).hexdigest())
    return hashing.digest(digests)


def calibration_sets(names: str) -> list[str]:
    """The calibration sets of one parameter: names or files with commas between. A file whose own
    name has a comma is one set.
    """
    return [names] if Path(names).is_file() else names.split(",")


def calibration_digests(names: str) -> dict[str, str]:
    """sha256 of the rows of each calibration set, and of its images: {"calibration", "images",
    "calibration 2", ...}.

    names: one set or several, with commas between.
    """
    digests = {}
    for n, name in enumerate(calibration_sets(names)):
        place = f" {n + 1}" if n else ""
        rows = image_rows(name)
        digests[f"calibration{place}"] = read_card(name).digest("calibration")
        if rows:
            digests[f"images{place}"] = images_digest(name, rows)
    return digests
