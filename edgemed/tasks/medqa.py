"""MedQA (USMLE): licensing-examination vignettes with four options.

The prompt is worded as in lm-evaluation-harness (task medqa_4options), so that scores can be
compared with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import Example, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "options": {"A": text, ...}, "answer": "A"}."""
    return multiple_choice(row)


TASK = lettered_task(
    name="medqa",
    template="Question: {question}\n{options}\nAnswer:",
    source="MedQA-USMLE, four options (Jin et al. 2020), github.com/jind11/MedQA",
    licence="MIT",
    split="test (official 1,273; the shipped sample is part of it)",
    wording="lm-evaluation-harness medqa_4options",
    example=example,
    shots="medqa.shots.jsonl",
)
