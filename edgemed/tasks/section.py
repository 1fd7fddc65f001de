"""Which section of an abstract is this passage? The quickstart model's own task, over PubMedQA's
section labels.

It exists because a tiny model can really learn it, so that the accuracy comparisons of the
quickstart compare something real.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.evaluation.task import Example, Prompt, Task, text, worded, worded_prompt

SECTIONS = ("background", "methods", "results", "conclusions")


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "passage", "answer": one of SECTIONS}."""
    return worded(row, f"Passage: {text(row, 'passage')}", SECTIONS)


def render(example: Example) -> Prompt:
    return worded_prompt(example, "Section:")


TASK = Task(
    name="section",
    source="PubMedQA PQA-L (Jin et al. 2019), official test split, sections of the abstracts",
    licence="MIT",
    split="test",
    metric="accuracy",
    prompt="Passage: {passage}\nSection:",
    wording="edgemed's own",
    sample="section.jsonl",
    example=example,
    render=render,
    shots="section.shots.jsonl",
)
