"""HEAD-QA: examinations for specialised posts in the Spanish health system, in Spanish and in
English translation.

The prompt is worded as in lm-evaluation-harness (tasks headqa_en and headqa_es): the options are
not listed, each is scored as the answer's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.task import Example, Prompt, Task, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "options": {"A": text, ...}, "answer": "A", "subject", "language":
    "en" | "es"}; subject may be left out.
    """
    return multiple_choice(row, "subject", "language")


def render(example: Example) -> Prompt:
    return Prompt(
        f"Question: {example.question}\nAnswer:", tuple(f" {option}" for option in example.options)
    )


TASK = Task(
    name="headqa",
    source=(
        "HEAD-QA (Vilares and Gomez-Rodriguez 2019), github.com/aghie/head-qa; questions with an"
        " image left out"
    ),
    licence="MIT",
    split=(
        "test (official, 2,675 without images per language; the shipped sample holds other"
        " questions in each language)"
    ),
    metric="accuracy",
    prompt="Question: {question}\nAnswer:",
    wording="lm-evaluation-harness headqa_en, headqa_es",
    sample="headqa.jsonl",
    example=example,
    render=render,
    languages=("en", "es"),
    shots="headqa.shots.jsonl",
)
