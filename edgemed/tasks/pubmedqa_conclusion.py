"""PubMedQA with the conclusion given: does it answer the question with yes, no or maybe?

It exists because a small language model can really learn it: it takes reading two sentences, not
the whole abstract. The authors call it the reasoning-free setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.task import Example, Prompt, Task, text, worded, worded_prompt

ANSWERS = ("yes", "no", "maybe")


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "question", "long_answer", "answer": "yes" | "no" | "maybe"}."""
    question = f"Conclusion: {text(row, 'long_answer')}\nQuestion: {text(row, 'question')}"
    return worded(row, question, ANSWERS)


def render(example: Example) -> Prompt:
    return worded_prompt(example, "Answer:")


TASK = Task(
    name="pubmedqa_conclusion",
    source="PubMedQA PQA-L (Jin et al. 2019), the reasoning-free setting: the conclusion is given",
    licence="MIT",
    split="test (official 500)",
    metric="accuracy",
    prompt="Conclusion: {long_answer}\nQuestion: {question}\nAnswer:",
    wording="edgemed's own",
    sample="pubmedqa_conclusion.jsonl",
    example=example,
    render=render,
    shots="pubmedqa_conclusion.shots.jsonl",
)
