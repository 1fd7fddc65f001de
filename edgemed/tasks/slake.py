"""SLAKE: questions in English and Chinese about CT, MR and chest radiographs, closed and open.

The published test.json works as it is. What is shipped is a synthetic stand-in, because the images
may not be passed on here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.answer_matching import closed_and_open, closed_or_open, render
from edgemed.evaluation.task import Example, Task, text


def english(row: Mapping[str, Any]) -> bool:
    return row["q_lang"] == "en"


def chinese(row: Mapping[str, Any]) -> bool:
    return row["q_lang"] == "zh"


def example(row: Mapping[str, Any]) -> Example:
    """Rows of the published file: {"qid", "img_name", "question", "answer", "q_lang",
    "answer_type": "CLOSED" | "OPEN", "modality", "location"}.
    """
    groups = {"modality": text(row, "modality"), "location": text(row, "location")}
    return closed_or_open(
        str(row["qid"]),
        text(row, "question"),
        str(row["answer"]),
        text(row, "answer_type") == "CLOSED",
        groups,
        (text(row, "img_name"),),
    )


TASK = Task(
    name="slake",
    source="SLAKE (Liu et al., ISBI 2021), med-vqa.com/slake",
    licence="CC BY 4.0",
    split="test (1,061 questions in English); part zh: in Chinese. The shipped sample is synthetic",
    metric="accuracy: closed by the option named, open by exact match; scores beside it",
    prompt="{question}\nAnswer the question using a single word or phrase.",
    wording="the short-answer instruction of Liu et al. 2024 (arXiv 2310.03744)",
    sample="slake.jsonl",
    example=example,
    render=render,
    images="slake.zip",
    place=(
        "Download SLAKE from med-vqa.com/slake and put its folders xmlab0, xmlab1, ... beside"
        " test.json (slake:PATH/test.json)"
    ),
    parts={"en": english, "zh": chinese},
    scores=closed_and_open,
)
