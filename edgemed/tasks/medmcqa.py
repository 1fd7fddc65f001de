"""MedMCQA: questions of Indian medical entrance examinations, by subject.

The prompt is worded as in lm-evaluation-harness (task medmcqa), so that scores can be compared with
published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import Example, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "options": {"A": text, ...}, "answer": "A", "subject"}; subject may
    be left out.
    """
    return multiple_choice(row, "subject")


TASK = lettered_task(
    name="medmcqa",
    template="Question: {question}\nChoices:\n{options}\nAnswer:",
    source="MedMCQA (Pal et al. 2022), github.com/medmcqa/medmcqa",
    licence="MIT",
    split=(
        "dev (official 4,183, the split that is published with answers; the shipped sample takes"
        " the same number from each of 20 subjects)"
    ),
    wording="lm-evaluation-harness medmcqa",
    example=example,
    shots="medmcqa.shots.jsonl",
)
