"""MedQA (USMLE): licensing-examination vignettes with four options.

The prompt is worded as in lm-evaluation-harness (task medqa_4options), so that scores can be
compared with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.task import Example, Prompt, Task, lettered, letters, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "options": {"A": text, ...}, "answer": "A"}."""
    return multiple_choice(row)


def render(example: Example) -> Prompt:
    return Prompt(
        f"Question: {example.question}\n{lettered(example.options)}\nAnswer:",
        letters(example.options),
    )


TASK = Task(
    name="medqa",
    source="MedQA-USMLE, four options (Jin et al. 2020), github.com/jind11/MedQA",
    licence="MIT",
    split="test (official 1,273; the shipped sample is part of it)",
    metric="accuracy",
    prompt="Question: {question}\nA. {option}\nB. {option}\n...\nAnswer:",
    wording="lm-evaluation-harness medqa_4options",
    sample="medqa.jsonl",
    example=example,
    render=render,
    lettered=True,
    shots="medqa.shots.jsonl",
)
