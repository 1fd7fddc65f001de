"""Real images with questions that have a checkable answer: blood cells (BCCD), red-cell shapes
(Chula) and the body region of a radiograph (VQA-RAD).

The only place that decides which images are held out and what is asked, so that training, the
shipped samples and the evaluation cannot disagree. Elliptocytes are left out: they come from
another imaging series with another background, and a model would learn the colour and not the
shape.
"""

import io
import json
import random
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass

from PIL import Image

BLOOD = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}
# Chula's twelve classes without elliptocyte (see above); names as a haematologist writes them.
SHAPES = {
    "normal_cell": "normal red cell",
    "macrocyte": "macrocyte",
    "microcyte": "microcyte",
    "spherocyte": "spherocyte",
    "target_cell": "target cell",
    "stomatocyte": "stomatocyte",
    "ovalocyte": "ovalocyte",
    "teardrop": "teardrop cell",
    "burr_cell": "burr cell",
    "schistocyte": "schistocyte",
    "hypochromia": "hypochromic cell",
}
REGIONS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
ASKED = {
    "blood": "Which blood cell does the image show?",
    "shape": "Which kind of red cell does the image show?",
    "region": "Which part of the body does the image show?",
}
# red blood cells outnumber platelets twelve to one; so many of each class are kept for training
PER_CLASS = 420


@dataclass(frozen=True)
class Picture:
    """One image with its class. kind: blood, shape or region; split: train or test; label: the
    class as it is named in an answer.
    """

    id: str
    kind: str
    split: str
    label: str
    png: bytes

    def image(self):
        return Image.open(io.BytesIO(self.png)).convert("RGB")


def encoded(image, largest=112):
    image.thumbnail((largest, largest), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def blood(data):
    """Crops around BCCD's boxes with a third of margin; the official test photographs are held
    out.
    """
    folder = data / "images" / "bccd"
    held = set((folder / "ImageSets" / "Main" / "test.txt").read_text().split())
    for file in sorted((folder / "Annotations").glob("*.xml")):
        photograph = folder / "JPEGImages" / f"{file.stem}.jpg"
        if not photograph.is_file():
            continue
        whole = Image.open(photograph).convert("RGB")
        for number, entry in enumerate(ElementTree.parse(file).iter("object")):
            left, top, right, bottom = (
                int(entry.find("bndbox").find(k).text) for k in ("xmin", "ymin", "xmax", "ymax")
            )
            if right - left < 12 or bottom - top < 12:
                continue
            side = 1.33 * max(right - left, bottom - top) / 2
            x = (left + right) / 2
            y = (top + bottom) / 2
            crop = whole.crop(
                tuple(
                    int(v)
                    for v in (
                        max(0, x - side),
                        max(0, y - side),
                        min(whole.width, x + side),
                        min(whole.height, y + side),
                    )
                )
            )
            yield Picture(
                f"bccd/{file.stem}/{number}",
                "blood",
                "test" if file.stem in held else "train",
                BLOOD[entry.find("name").text],
                encoded(crop),
            )


def shapes(data):
    """Chula's crops, split by source photograph as they come."""
    with zipfile.ZipFile(data / "images" / "chula_rbc12_cells" / "cells.zip") as archive:
        for name in sorted(archive.namelist()):
            split, label, file = name.split("/")
            if label in SHAPES:
                crop = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                yield Picture(
                    f"chula/{split}/{label}/{file.removesuffix('.jpg')}",
                    "shape",
                    split,
                    SHAPES[label],
                    encoded(crop),
                )


def regions(data):
    """VQA-RAD's radiographs and slices with the region they were catalogued under, split so that no
    image is in both parts.
    """
    rows = [
        json.loads(line)
        for line in (data / "vqa" / "vqa_rad" / "vqa_rad.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    for name, (organ, split) in sorted(
        {r["image"]: (r["organ"], r["image_disjoint_split"]) for r in rows}.items()
    ):
        picture = Image.open(data / "vqa" / "vqa_rad" / "images" / name).convert("RGB")
        yield Picture(
            f"vqa_rad/{name.removesuffix('.jpg')}",
            "region",
            split,
            REGIONS[organ],
            encoded(picture),
        )


def pictures(data):
    """Everything, the training part with at most PER_CLASS of a class; seeded."""
    found = [*blood(data), *shapes(data), *regions(data)]
    random.Random(0).shuffle(found)
    kept = []
    counts = {}
    for picture in found:
        key = (picture.split, picture.kind, picture.label)
        counts[key] = counts.get(key, 0) + 1
        if picture.split == "test" or counts[key] <= PER_CLASS:
            kept.append(picture)
    return kept


def options(picture, generator):
    """The answers offered, in random order: three for blood and region, the right one and three
    others for shapes.
    """
    names = {"blood": BLOOD, "shape": SHAPES, "region": REGIONS}[picture.kind].values()
    others = generator.sample(
        [name for name in names if name != picture.label], 3 if picture.kind == "shape" else 2
    )
    offered = [picture.label, *others]
    generator.shuffle(offered)
    return offered


def question(picture, offered):
    """The options are named without letters: looking a letter up is more than a model of this size
    learns in the time given to it (README).
    """
    return f"{ASKED[picture.kind]} Options: {'; '.join(offered)}."


def best(scores, asked):
    """The option with the highest score for each (picture, options); scores of all options in a
    row.
    """
    found = []
    start = 0
    for _, offered in asked:
        own = scores[start : start + len(offered)]
        found.append(offered[own.index(max(own))])
        start += len(offered)
    return found
