"""VQA-RAD: clinicians' questions about radiographs, CT and MR slices, half of them closed (mostly
yes or no), half open.

Its official test questions are about images that are in training too; the part `image_disjoint`
asks only about images that are not. Published closed accuracies and open recalls are computed so
that they flatter; they are reported beside honest ones as legacy_closed and legacy_open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.answer_matching import closed_and_open, closed_or_open, render
from edgemed.evaluation.task import Example, Task, text


def official(row: Mapping[str, Any]) -> bool:
    """The official test questions, in the published file marked by their phrase type."""
    return row["split"] == "test" if "split" in row else str(row["phrase_type"]).startswith("test")


def image_disjoint(row: Mapping[str, Any]) -> bool:
    return row["image_disjoint_split"] == "test"


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"qid", "image", "question", "answer", "answer_type": "CLOSED" | "OPEN", "organ",
    "split", "image_disjoint_split"}; the published file has "image_name" and "image_organ".
    """
    image = text(row, "image" if "image" in row else "image_name")
    organ = text(row, "organ" if "organ" in row else "image_organ")
    return closed_or_open(
        str(row["qid"]),
        text(row, "question"),
        str(row["answer"]),
        text(row, "answer_type").strip() == "CLOSED",
        {"region": organ.lower()},
        (image,),
    )


TASK = Task(
    name="vqa_rad",
    source="VQA-RAD (Lau et al., Sci Data 2018), osf.io/89kps; images from MedPix",
    licence="CC0-1.0",
    split=(
        "official test, 451 questions; part image_disjoint: 716 questions about images in no"
        " training question (the shipped sample holds some of each)"
    ),
    metric="accuracy: closed by the option named, open by exact match; scores beside it",
    prompt="{question}\nAnswer the question using a single word or phrase.",
    wording="the short-answer instruction of Liu et al. 2024 (arXiv 2310.03744)",
    sample="vqa_rad.jsonl",
    example=example,
    render=render,
    images="vqa_rad.zip",
    parts={"official": official, "image_disjoint": image_disjoint},
    scores=closed_and_open,
)
