"""PathVQA: questions about pathology figures of textbooks, half of them yes or no, half open.

What is shipped is a synthetic stand-in, because the figures are a publisher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.answer_matching import (
    YES_NO,
    closed_and_open,
    closed_or_open,
    normalised,
    render,
)
from edgemed.evaluation.task import Example, Task, image_names, text


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "image", "question", "answer"}; a question is closed where its answer is yes or
    no, as in the papers.
    """
    answer = str(row["answer"])
    return closed_or_open(
        str(row["id"]),
        text(row, "question"),
        answer,
        normalised(answer) in YES_NO,
        {},
        image_names(row),
    )


TASK = Task(
    name="pathvqa",
    source="PathVQA (He et al. 2020), github.com/UCSD-AI4H/PathVQA",
    licence="MIT (questions; the figures belong to their publishers)",
    split="test (6,719 questions). The shipped sample is synthetic",
    metric="accuracy: closed by the option named, open by exact match; scores beside it",
    prompt="{question}\nAnswer the question using a single word or phrase.",
    wording="the short-answer instruction of Liu et al. 2024 (arXiv 2310.03744)",
    sample="pathvqa.jsonl",
    example=example,
    render=render,
    images="pathvqa.zip",
    place=(
        "Write PathVQA's test split as rows with id, image, question and answer, and put the images"
        " beside them (pathvqa:PATH/test.jsonl)"
    ),
    scores=closed_and_open,
)
