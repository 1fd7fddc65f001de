"""Whether a calibration set holds questions of a task.

Texts overlap where they share thirteen words in a row (Brown et al. 2020, arXiv 2005.14165).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgemed import plugins
from edgemed.console import say
from edgemed.data.calibration_cards import traces_of, words
from edgemed.data.text_sets import TextCard, read_card, texts_of
from edgemed.evaluation.task import questions

# Words in a row that two texts must share to count as overlapping (Brown et al. 2020, arXiv
# 2005.14165, appendix C).
GRAM = 13


def grams(text: str) -> set[str]:
    """Every GRAM words in a row; of a shorter text, that text itself where it has at least half as
    many.
    """
    row = words(text)
    if 2 * len(row) < GRAM:
        return set()
    if len(row) < GRAM:
        return {" ".join(row)}
    return {" ".join(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)}


def overlap(card: TextCard, splits: Iterable[str], specs: Iterable[str]) -> list[dict[str, Any]]:
    """One row per task and split: how many of its questions share GRAM words in a row with the
    card's texts, and which do first.

    A question is its words without the task's wording, with its options and its reference answer
    each by themselves. Raises EdgemedError as task.questions.
    """
    grams_of_split: dict[str, set[str]] = {}
    for split in splits:
        grams_of_split[split] = set().union(*(grams(text) for text in texts_of(card.file(split))))
    rows = []
    for spec in specs:
        examples = questions(spec).examples
        for split, card_grams in grams_of_split.items():
            hits = []
            for example in examples:
                parts = (example.question, *example.options, example.reference)
                if any(grams(part) & card_grams for part in parts):
                    hits.append(example.id)
            rows.append(
                {
                    "task": spec,
                    "split": split,
                    "questions": len(examples),
                    "overlapping": len(hits),
                    "first": hits[:3],
                }
            )
    return rows


def every_task() -> list[str]:
    """All shipped samples, with each part of those that have parts. One whose images do not come
    with the wheel is left out there, which is said.
    """
    specs = []
    for name in plugins.names("tasks"):
        task = plugins.load("tasks", name).TASK
        if task.images and not (plugins.ROOT / "tasks" / "samples" / task.images).is_file():
            say(f"{name}: its images are not installed, so its questions were not looked at")
            continue
        specs += [f"{name}/{part}" for part in task.parts] or [name]
    return specs


def check_contamination(name: str, specs: Iterable[str] = ()) -> dict[str, Any]:
    """What a card shares with evaluations (every shipped sample where none is named) and what in it
    looks like data of patients.
    """
    card = read_card(name)
    for split in card.files:
        card.digest(split)
    traces = [
        {"split": split, "text": number, "kind": kind}
        for split in card.files
        for number, kind in traces_of(texts_of(card.file(split)))
    ]
    return {
        "card": card.name,
        "words_in_a_row": GRAM,
        "overlap": overlap(card, card.files, list(specs) or every_task()),
        "traces": traces,
    }
