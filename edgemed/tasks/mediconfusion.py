"""MediConfusion: pairs of images with one question between them, whose right answers differ; a
model that cannot tell them apart gives one answer twice.

Set accuracy and confusion are its own metrics, the plain accuracy of single questions is what pairs
an engine with its source. What is shipped is a synthetic stand-in, because the images come from
ROCO under licences of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgemed.documents.evaluation import Item, Score
from edgemed.evaluation.lettered import lettered_task
from edgemed.evaluation.task import Example, image_names, multiple_choice, text


def example(row: Mapping[str, Any]) -> Example:
    """Rows: {"pair", "image", "question", "options": {"A": text, "B": text}, "answer": letter,
    "category"}; two rows per pair, options in the same order.
    """
    if "/" in text(row, "pair"):
        raise ValueError("'pair' holds a slash")
    identity = f"{row['pair']}/{text(row, 'image')}"
    question = multiple_choice({**row, "id": identity}, "category")
    return replace(question, images=image_names(row))


def scores(pairs: Sequence[tuple[Example, Item]]) -> dict[str, Score]:
    """set_accuracy: share of pairs with both answers right; confusion: share of pairs with two
    answers in which both are the same (Sepehri et al. 2024).

    A pair of which only one row was asked (a limit) is left out.
    """
    sets: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for example, item in pairs:
        sets[example.id.partition("/")[0]].append((item.answer, item.gold))
    whole = [rows for rows in sets.values() if len(rows) == 2]
    answered = [rows for rows in whole if all(answer >= 0 for answer, _ in rows)]
    both = sum(all(a == g for a, g in rows) for rows in whole)
    same = sum(rows[0][0] == rows[1][0] for rows in answered)
    return {
        "set_accuracy": Score(value=both / len(whole) if whole else None, n=len(whole)),
        "confusion": Score(value=same / len(answered) if answered else None, n=len(answered)),
    }


TASK = lettered_task(
    name="mediconfusion",
    template="{question}\n{options}",
    source="MediConfusion (Sepehri et al. 2024), github.com/AIF4S/MediConfusion",
    licence="MIT (questions; the images are ROCO's)",
    split="all 176 pairs. The shipped sample is synthetic",
    metric="accuracy of single questions; set accuracy and confusion in scores",
    prompt="{question}\nA) {option}\nB) {option}",
    wording="edgemed's own, in the form of the model's family",
    example=example,
    images="mediconfusion.zip",
    place=(
        "Download MediConfusion with its images, write two rows for each pair of its dataset.json,"
        " and put the images beside them (mediconfusion:PATH/rows.jsonl)"
    ),
    scores=scores,
)
