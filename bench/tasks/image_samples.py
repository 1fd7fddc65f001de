"""Cuts the samples of the tasks with images: real ones where the data may be passed on (cells,
vqa_rad), labelled synthetic ones where it may not.

Called by make_samples.py. Seeded, and zip files carry no dates, so that the same data gives the
same bytes. Synthetic samples hold drawn shapes: they show the layout and test the loaders, and say
nothing about any model.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from edgemed.data.calibration_cards import words
from edgemed.evaluation.task import questions

PROJECT = Path(__file__).resolve().parents[2]
SAMPLES = PROJECT / "edgemed" / "tasks" / "samples"
SEED = 20240601
PER_LABEL = {"blood": 29, "shape": 8, "region": 21}
SIDE = 224
QUALITY = 80
Row = dict[str, Any]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pack(file: Path, images: dict[str, bytes]) -> Path:
    """A zip file with these members, the same bytes every time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for member, content in sorted(images.items()):
            archive.writestr(zipfile.ZipInfo(member, (1980, 1, 1, 0, 0, 0)), content)
    return file


def save(name: str, rows: list[Row], images: dict[str, bytes], facts: Row) -> None:
    """Sample, images and card."""
    file = SAMPLES / f"{name}.jsonl"
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    archive = pack(SAMPLES / f"{name}.zip", images)
    described = {
        "file": archive.name,
        "n": len(images),
        "bytes": archive.stat().st_size,
        "sha256": sha256(archive),
    }
    card = {
        "name": name,
        **facts,
        "n": len(rows),
        "sha256": sha256(file),
        "images": described,
        "contains_phi": False,
    }
    (SAMPLES / f"{name}.card.yaml").write_text(
        yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=150), encoding="utf-8"
    )


def whole(data: Path, path: str, n: int) -> Row:
    return {"path": path, "sha256": sha256(data / path), "n": n}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cells(data: Path) -> None:
    """The same number of each label, from what bench/tiny/cells.py holds out; its questions, its
    options, in a seeded order.
    """
    sys.path.insert(0, str(PROJECT / "bench" / "tiny"))
    from cells import ASKED, options, pictures

    left: dict[tuple[str, str], int] = {}
    rows = []
    images = {}
    held = sorted(
        (picture for picture in pictures(data) if picture.split == "test"),
        key=lambda picture: picture.id,
    )
    for picture in random.Random(f"{SEED} cells").sample(held, len(held)):
        taken = left.get((picture.kind, picture.label), 0)
        if taken == PER_LABEL[picture.kind]:
            continue
        left[picture.kind, picture.label] = taken + 1
        offered = options(picture, random.Random(f"{SEED} {picture.id}"))
        name = picture.id.replace("/", "_") + ".jpg"
        rows.append(
            {
                "id": picture.id,
                "image": name,
                "question": ASKED[picture.kind],
                "options": offered,
                "answer": offered.index(picture.label),
                "kind": picture.kind,
                "label": picture.label,
            }
        )
        images[name] = encoded(picture.image(), "JPEG", quality=95, subsampling=0)
    save(
        "cells",
        rows,
        images,
        {
            "source": (
                "BCCD, shenggan (github.com/Shenggan/BCCD_Dataset, commit d272fb14cdff), MIT; Chula"
                " RBC-12, Naruenatthanaset et al. 2021"
                " (github.com/Chula-PIC-Lab/Chula-RBC-12-Dataset, commit fa130f48135d), MIT;"
                " VQA-RAD, Lau et al. 2018 (osf.io/89kps), CC0-1.0"
            ),
            "url": "https://github.com/Shenggan/BCCD_Dataset",
            "licence": "MIT and CC0-1.0",
            "split": (
                "test: official photographs of BCCD, Chula's test photographs, image-disjoint"
                " VQA-RAD"
            ),
            "whole_set": {
                "path": "bench/tiny/cells.py over images/ and vqa/",
                "sha256": sha256(PROJECT / "bench" / "tiny" / "cells.py"),
                "n": len(held),
            },
            "changes": (
                "crops around the cells, images reduced to at most 112 pixels, JPEG quality 95"
                " without colour subsampling (as PNG they were three times as large);"
                f" {PER_LABEL['blood']} of each blood cell, {PER_LABEL['shape']} of each red-cell"
                f" shape and {PER_LABEL['region']} of each body region, or all there are, shuffled;"
                " options in a seeded order; elliptocytes left out (another imaging series,"
                " recognised by its colour)"
            ),
        },
    )


def vqa_rad(data: Path) -> None:
    """Official and image-disjoint test questions about 100 images, 40 of them of the image-disjoint
    test part.
    """
    folder = data / "vqa" / "vqa_rad"
    rows = [
        json.loads(line)
        for line in (folder / "vqa_rad.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    generator = random.Random(f"{SEED} vqa_rad")
    apart, official = (
        sorted({row["image"] for row in rows if row[split] == "test"})
        for split in ("image_disjoint_split", "split")
    )
    shown = set(generator.sample(apart, 40))
    shown |= set(generator.sample([name for name in official if name not in apart], 60))
    asked = [
        row
        for row in rows
        if row["image"] in shown and "test" in (row["split"], row["image_disjoint_split"])
    ]
    mixed = generator.sample(asked, len(asked))
    of = {
        split: [row["qid"] for row in mixed if row[split] == "test"][:200]
        for split in ("split", "image_disjoint_split")
    }
    kept = {qid for part in of.values() for qid in part}
    sample = [row for row in mixed if row["qid"] in kept]
    images = {
        name: thumbnail(folder / "images" / name)
        for name in sorted({row["image"] for row in sample})
    }
    save(
        "vqa_rad",
        sample,
        images,
        {
            "source": (
                "VQA-RAD, Lau et al., Sci Data 2018 (osf.io/89kps; images from MedPix); copy from"
                " Nana2929/Medical-VQA, commit d24e3110815f"
            ),
            "url": "https://osf.io/89kps",
            "licence": "CC0-1.0",
            "split": "official test (451) and the test part of a split without shared images (716)",
            "whole_set": whole(data, "vqa/vqa_rad/vqa_rad.jsonl", len(rows)),
            "changes": (
                f"questions about 100 seeded images; images reduced to at most {SIDE} pixels, JPEG"
                f" quality {QUALITY}: published numbers are made on the full images;"
                " image_disjoint_split added"
            ),
        },
    )


def shown_in_verify(data: Path) -> None:
    """calibration/vqa-rad-images: the images engines that see are verified on, none of them in a
    test part of any split; one question about each.
    """
    folder = data / "vqa" / "vqa_rad"
    out = PROJECT / "calibration" / "vqa-rad-images"
    rows = [
        json.loads(line)
        for line in (folder / "vqa_rad.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    asked = {row["image"] for row in rows if "test" in (row["split"], row["image_disjoint_split"])}
    generator = random.Random(f"{SEED} verify")
    apart = [row for row in rows if row["image"] not in asked]
    chosen = []
    for organ, count in (("HEAD", 4), ("CHEST", 3), ("ABD", 3)):
        names = sorted({row["image"] for row in apart if row["organ"] == organ})
        chosen += [
            generator.choice([row for row in apart if row["image"] == name])
            for name in generator.sample(names, count)
        ]
    rows = [
        {"id": str(row["qid"]), "image": row["image"], "question": row["question"]}
        for row in generator.sample(chosen, len(chosen))
    ]
    described = (
        "Ten radiographs, CT and MR slices with one question each, shown to engines that see when"
        " they are verified. The official train split, none of them in a test part."
    )
    image_card(out, folder, described, {"heldout": rows})
    known = {row["image"] for row in rows}
    calibrated_on(folder, [row for row in apart if row["image"] not in known])


def calibrated_on(folder: Path, rows: list[dict[str, Any]]) -> None:
    """calibration/vqa-rad-questions: images with two questions each and their answers, for steps
    that calibrate; none of them is verified on or asked about in a test.
    """
    asked = {" ".join(words(example.question)) for example in questions("vqa_rad").examples}
    generator = random.Random(f"{SEED} calibrate")
    # Questions of seven words and more that a test asks too, of another image, are left out:
    # shorter ones are everywhere.
    fresh = [
        row
        for row in rows
        if len(words(row["question"])) < 7 or " ".join(words(row["question"])) not in asked
    ]
    several = sorted(
        name for name, count in Counter(row["image"] for row in fresh).items() if count > 1
    )
    chosen = generator.sample(several, 48)
    parts = {}
    for split, names in (("calibration", chosen[:40]), ("heldout", chosen[40:])):
        picked = [
            row
            for name in names
            for row in generator.sample([row for row in fresh if row["image"] == name], 2)
        ]
        parts[split] = [
            {
                "id": str(row["qid"]),
                "image": row["image"],
                "question": row["question"],
                "answer": str(row["answer"]),
            }
            for row in picked
        ]
    described = (
        "Radiographs, CT and MR slices with two questions each and their answers, which models that"
        " see are calibrated on. The official train split, none of them in a test part."
    )
    image_card(PROJECT / "calibration" / "vqa-rad-questions", folder, described, parts)


def image_card(
    out: Path, folder: Path, description: str, parts: dict[str, list[dict[str, Any]]]
) -> None:
    """Write rows, images and card of a set made of VQA-RAD."""
    out.mkdir(exist_ok=True)
    for split, rows in parts.items():
        (out / f"{split}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    images = {
        row["image"]: thumbnail(folder / "images" / row["image"])
        for rows in parts.values()
        for row in rows
    }
    pack(out / "images.zip", images)
    counts = {split: len(rows) for split, rows in parts.items()} | {"images": len(images)}
    files = {
        split: {"file": file, "sha256": sha256(out / file), "n": count}
        for split, count in counts.items()
        for file in ["images.zip" if split == "images" else f"{split}.jsonl"]
    }
    card = {
        "name": out.name,
        "description": description,
        "source": (
            "VQA-RAD, Lau et al., Sci Data 2018 (osf.io/89kps; images from MedPix); copy from"
            " Nana2929/Medical-VQA, commit d24e3110815f"
        ),
        "url": "https://osf.io/89kps",
        "licence": "CC0-1.0",
        "language": "en",
        "contains_phi": False,
        "changes": f"images reduced to at most {SIDE} pixels, JPEG quality {QUALITY}",
        "files": files,
    }
    (out / "card.yaml").write_text(
        yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=150), encoding="utf-8"
    )


def thumbnail(file: Path) -> bytes:
    image = Image.open(file)
    image = image if image.mode == "L" else image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=QUALITY)


def drawn(colour: str, shape: str) -> bytes:
    """A filled shape on black, 64 x 64."""
    image = Image.new("RGB", (64, 64))
    draw = ImageDraw.Draw(image)
    {"circle": draw.ellipse, "square": draw.rectangle}[shape]((14, 14, 50, 50), fill=colour)
    return encoded(image, "PNG")


def synthetic() -> None:
    """Eight rows or so in the layout of each set that cannot be passed on."""
    shapes = [
        (colour, shape)
        for colour in ("red", "green", "blue", "white")
        for shape in ("circle", "square")
    ]
    images = {f"synthetic/{colour}_{shape}.png": drawn(colour, shape) for colour, shape in shapes}
    names = list(images)
    which = "Which shape does the synthetic image show?"

    def choice(number: int, **more: Any) -> Row:
        return {
            "id": f"synthetic-{number}",
            "image": names[number],
            "question": which,
            "options": {"A": "circle", "B": "square"},
            "answer": "AB"[shapes[number][1] == "square"],
            **more,
        }

    open_closed = [
        {"image": name, "question": question, "answer": answer, "answer_type": kind}
        for name, (colour, shape) in zip(names, shapes, strict=True)
        for question, answer, kind in (
            (
                "Is there a circle in the synthetic image?",
                "yes" if shape == "circle" else "no",
                "CLOSED",
            ),
            ("Which colour has the synthetic image's shape?", colour, "OPEN"),
        )
    ]
    modalities = (
        "MR (Mag-netic Resonance Imaging)",
        "CT(Computed Tomography)",
        "X-Ray",
        "Dermoscopy",
    )
    rows = {
        "slake": [
            {
                "qid": n,
                "img_name": row["image"],
                **{key: row[key] for key in ("question", "answer", "answer_type")},
                "q_lang": "en",
                "modality": ("MRI", "CT", "X-Ray")[n % 3],
                "location": "none",
            }
            for n, row in enumerate(open_closed)
        ],
        "pathvqa": [
            {"id": f"synthetic-{n}", **{key: row[key] for key in ("image", "question", "answer")}}
            for n, row in enumerate(open_closed)
        ],
        "omnimedvqa": [
            {
                "dataset": "synthetic",
                "question_id": f"synthetic-{n}",
                "question": which,
                "gt_answer": shape,
                "image_path": names[n],
                "option_A": "circle",
                "option_B": "square",
                "modality_type": modalities[n % 4],
            }
            for n, (_, shape) in enumerate(shapes)
        ],
        "mediconfusion": [
            {
                "pair": f"synthetic-{n // 2}",
                **{
                    key: value
                    for key, value in choice(n, category="synthetic").items()
                    if key != "id"
                },
            }
            for n in range(8)
        ],
        "worldmedqa_v": [
            choice(
                n,
                country=("brazil", "israel", "japan", "spain")[n % 4],
                language=("pt", "he", "ja", "es", "en", "en", "en", "en")[n],
            )
            for n in range(8)
        ],
        "micro_bench": [choice(n, kind="shape", modality="synthetic") for n in range(8)],
    }
    rows["slake"] += [
        {
            "qid": 16 + n,
            "img_name": names[n],
            "question": "合成图像中是什么形状？",
            "answer": "圆形" if shapes[n][1] == "circle" else "方形",
            "answer_type": "OPEN",
            "q_lang": "zh",
            "modality": "MRI",
            "location": "none",
        }
        for n in range(4)
    ]
    from edgemed import plugins

    for name, found in rows.items():
        task = plugins.load("tasks", name).TASK
        save(
            name,
            found,
            images,
            {
                "source": task.source,
                "url": f"https://{task.source.split(', ')[-1]}",
                "licence": task.licence,
                "synthetic": True,
                "split": (
                    "none: synthetic rows about drawn shapes, in the layout of the published set;"
                    " none of its data is here"
                ),
                "changes": "everything is synthetic",
            },
        )
