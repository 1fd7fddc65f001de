"""Micro-Bench: multiple choice about microscopy, from the modality and stain of an image to the
kind of cell it shows.

What is shipped is a synthetic stand-in, because every image set has a licence of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import Example, image_names, multiple_choice


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"id", "image", "question", "options": [text, ...], "answer": index, "kind": what is
    asked (modality, stain, cell type ...), "modality"}.
    """
    return replace(multiple_choice(row, "kind", "modality"), images=image_names(row))


TASK = lettered_task(
    name="micro_bench",
    template="{question}\n{options}",
    source="Micro-Bench (Lozano et al., NeurIPS 2024), github.com/yeung-lab/u-Bench",
    licence="a licence for every image set, see the source",
    split="the published perception questions. The shipped sample is synthetic",
    wording="edgemed's own, in the form of the model's family",
    example=example,
    images="micro_bench.zip",
    place=(
        "Download Micro-Bench, write one row for each question of an image, and put the images"
        " beside them (micro_bench:PATH/rows.jsonl)"
    ),
)
