"""WorldMedQA-V without its images: medical examinations of Brazil, Israel, Japan and Spain, each in
its own language and in English.

lm-evaluation-harness has no such task; the prompt is worded like its medqa_4options, in English
around questions of every language. The questions come with an image that a text model is not shown,
so the accuracy is a lower bound, good for comparing an engine with its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import Example, multiple_choice

COUNTRIES = ("brazil", "israel", "japan", "spain")


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "options": {"A": text, ...}, "answer": "A", "country", "language"}.

    Without "country" it is read from an id such as brazil-17; it may be left out.
    """
    question = multiple_choice(row, "country", "language")
    country = question.id.split("-")[0]
    if country not in COUNTRIES:
        return question
    return replace(question, groups={"country": country, **question.groups})


TASK = lettered_task(
    name="worldmedqa",
    template="Question: {question}\n{options}\nAnswer:",
    source=(
        "WorldMedQA-V (Matos et al. 2024), github.com/WorldMedQA/V; text only, the images are not"
        " used"
    ),
    licence="MIT",
    split=(
        "the whole published set, 568 questions in two languages each (the shipped sample is part"
        " of it)"
    ),
    metric="accuracy (a lower bound: the images are missing)",
    wording="edgemed's own, like lm-evaluation-harness medqa_4options",
    example=example,
    languages=("pt", "he", "ja", "es", "en"),
    shots="worldmedqa.shots.jsonl",
)
