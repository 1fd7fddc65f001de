"""PubMedQA: does the abstract answer the question with yes, no or maybe?

The prompt is worded as in lm-evaluation-harness (task pubmedqa), so that scores can be compared
with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.task import Example, Prompt, Task, text, worded, worded_prompt

ANSWERS = ("yes", "no", "maybe")


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "contexts": [paragraph, ...], "answer": "yes" | "no" | "maybe"}."""
    if not isinstance(row["contexts"], list) or not "".join(row["contexts"]).strip():
        raise ValueError("'contexts' is not a list of paragraphs")
    question = "Abstract: " + "\n".join(row["contexts"]) + f"\nQuestion: {text(row, 'question')}"
    return worded(row, question, ANSWERS)


def render(example: Example) -> Prompt:
    return worded_prompt(example, "Answer:")


TASK = Task(
    name="pubmedqa",
    source="PubMedQA PQA-L (Jin et al. 2019), github.com/pubmedqa/pubmedqa",
    licence="MIT",
    split="test (official 500; the shipped sample is part of it)",
    metric="accuracy",
    prompt="Abstract: {contexts}\nQuestion: {question}\nAnswer:",
    wording="lm-evaluation-harness pubmedqa",
    sample="pubmedqa.jsonl",
    example=example,
    render=render,
    shots="pubmedqa.shots.jsonl",
)
