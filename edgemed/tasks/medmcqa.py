"""MedMCQA: questions of Indian medical entrance examinations, by subject.

The prompt is worded as in lm-evaluation-harness (task medmcqa), so that scores can be compared with
published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.task import Example, Prompt, Task, lettered, letters, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "options": {"A": text, ...}, "answer": "A", "subject"}; subject may
    be left out.
    """
    return multiple_choice(row, "subject")


def render(example: Example) -> Prompt:
    return Prompt(
        f"Question: {example.question}\nChoices:\n{lettered(example.options)}\nAnswer:",
        letters(example.options),
    )


TASK = Task(
    name="medmcqa",
    source="MedMCQA (Pal et al. 2022), github.com/medmcqa/medmcqa",
    licence="MIT",
    split=(
        "dev (official 4,183, the split that is published with answers; the shipped sample takes"
        " the same number from each of 20 subjects)"
    ),
    metric="accuracy",
    prompt="Question: {question}\nChoices:\nA. {option}\nB. {option}\n...\nAnswer:",
    wording="lm-evaluation-harness medmcqa",
    sample="medmcqa.jsonl",
    example=example,
    render=render,
    lettered=True,
    shots="medmcqa.shots.jsonl",
)
