"""What does this image show: a kind of blood cell, a shape of red cell, or a region of the body?
The quickstart's vision-language task.

It exists because a tiny model can really learn it, so that accuracy comparisons of vision models
compare something real. All images are of the parts that bench/tiny/cells.py holds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.evaluation.task import Example, Prompt, Task, image_names, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "image", "question", "options": [text, ...], "answer": index, "kind",
    "label"}.
    """
    return replace(multiple_choice(row, "kind", "label"), images=image_names(row))


def render(example: Example) -> Prompt:
    """Options in words, not letters: a model small enough to ship learns to see, and not to look
    letters up.
    """
    return Prompt(
        f"{example.question} Options: {'; '.join(example.options)}.",
        tuple(f" {option}" for option in example.options),
    )


TASK = Task(
    name="cells",
    source=(
        "BCCD (github.com/Shenggan/BCCD_Dataset), Chula RBC-12 (Naruenatthanaset et al. 2021) and"
        " the body regions of VQA-RAD (Lau et al. 2018)"
    ),
    licence="MIT and CC0-1.0",
    split="test (official photographs of BCCD, Chula's test photographs, image-disjoint VQA-RAD)",
    metric="accuracy",
    prompt="{question} Options: {option}; {option}; ...",
    wording="edgemed's own, in the form of the model's family",
    sample="cells.jsonl",
    example=example,
    render=render,
    images="cells.zip",
)
