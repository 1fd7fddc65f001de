"""WorldMedQA-V with its images: medical examinations of Brazil, Israel, Japan and Spain, each in
its own language and in English.

The task `worldmedqa` asks the same questions without the images. What is shipped is a synthetic
stand-in: the images were not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import Example, image_names, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "image", "question", "options": {"A": text, ...}, "answer": letter, "country",
    "language"}.
    """
    return replace(multiple_choice(row, "country", "language"), images=image_names(row))


TASK = lettered_task(
    name="worldmedqa_v",
    template="{question}\n{options}",
    source="WorldMedQA-V (Matos et al. 2024), github.com/WorldMedQA/V",
    licence="MIT",
    split=(
        "the whole published set, 568 questions in two languages each. The shipped sample is"
        " synthetic"
    ),
    wording="edgemed's own, in the form of the model's family",
    example=example,
    languages=("pt", "he", "ja", "es", "en"),
    images="worldmedqa_v.zip",
    place=(
        "Download WorldMedQA-V, write its questions as rows with an image's name each, and put the"
        " images beside them (worldmedqa_v:PATH/rows.jsonl)"
    ),
)
