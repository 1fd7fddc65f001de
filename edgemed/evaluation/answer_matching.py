"""Scores of answers a model writes itself: exact match and word recall, and beside them what the
papers computed.

Only exact match decides right or wrong here, so that an engine and its source can be paired item by
item. The legacy scores are for comparing with published numbers: they count 'no' inside 'normal' as
right, and reward long answers, so they are never what a gate judges.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from edgemed.documents.evaluation import Item, Score
from edgemed.evaluation.task import Example, Prompt

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
BRIEFLY = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's wording
YES_NO = ("yes", "no")
Pairs = Sequence[tuple[Example, Item]]


def closed_or_open(
    identity: str,
    question: str,
    answer: str,
    closed: bool,
    groups: Mapping[str, str],
    images: tuple[str, ...],
) -> Example:
    """A question of a set like VQA-RAD. Only yes and no are options; a closed question with another
    answer ('left or right?') is written like an open one.

    Raises ValueError for a blank answer.
    """
    if not normalised(answer):
        raise ValueError("'answer' is blank")
    groups = {"kind": "closed" if closed else "open", **groups}
    if closed and normalised(answer) in YES_NO:
        return Example(
            identity,
            question,
            YES_NO,
            YES_NO.index(normalised(answer)),
            groups,
            images,
        )
    return Example(
        identity,
        question,
        (),
        0,
        groups,
        images,
        answer.strip(),
    )


def render(example: Example) -> Prompt:
    """Task.render of such a set."""
    return Prompt(example.question + BRIEFLY, tuple(f" {option}" for option in example.options))


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, white space single: how SQuAD compares answers
    (Rajpurkar et al. 2016).
    """
    words = re.sub(r"[^\w\s]", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact(answer: str, reference: str) -> bool:
    """Whether the whole answer is the reference, both normalised."""
    return normalised(answer) == normalised(reference)


def recall(answer: str, reference: str) -> float:
    """Share of the reference's words that the answer holds, each as often as the reference has it;
    0..1.
    """
    wanted = Counter(normalised(reference).split())
    written = Counter(normalised(answer).split())
    return (wanted & written).total() / wanted.total() if wanted else 0.0


def legacy_closed(answer: str, reference: str) -> bool:
    """Med-MoE's closed accuracy: the reference somewhere inside the answer, lower case, so that
    'no' is found in 'normal' (its run_eval.py).
    """
    return reference.lower() in answer.lower()


def legacy_open(answer: str, reference: str) -> float:
    """LLaVA-Med's open recall: words of the answer that the reference has, counted as often as they
    are said, over those plus the reference's missing ones (its calculate_f1score), so that
    repeating a word helps; VQA's word normalisation without its table of contractions.
    """
    wanted = _counted_words(reference)
    written = _counted_words(answer)
    if not wanted or not written:
        return 0.0
    hits = sum(written[word] for word in written if word in wanted)
    missing = sum(wanted[word] for word in wanted if word not in written)
    return hits / (hits + missing)


def _counted_words(text: str) -> Counter[str]:
    """How often each word stands in a text, numbers up to ten as digits."""
    return Counter(NUMBERS.get(word, word) for word in normalised(text).split())


def answer_words(example: Example, item: Item) -> str:
    """The answer as words: what was written, else the option chosen, '' where there was none."""
    if item.text is not None:
        return item.text
    if example.options and item.answer >= 0:
        return example.options[item.answer]
    return ""


def right_answer(example: Example) -> str:
    return example.options[example.gold] if example.options else example.reference


def closed_and_open(pairs: Pairs) -> dict[str, Score]:
    """Task.scores of a set with closed and open questions (groups 'kind'): closed accuracy, open
    exact match and recall, and both legacy scores.
    """
    closed = [(example, item) for example, item in pairs if example.groups["kind"] == "closed"]
    opened = [(example, item) for example, item in pairs if example.groups["kind"] == "open"]
    closed_words = [(answer_words(*pair), right_answer(pair[0])) for pair in closed]
    open_words = [(answer_words(*pair), right_answer(pair[0])) for pair in opened]
    return {
        "closed_accuracy": mean([item.answer == example.gold for example, item in closed]),
        "open_exact": mean([item.answer == example.gold for example, item in opened]),
        "open_recall": mean([recall(answer, right) for answer, right in open_words]),
        "legacy_closed": mean([legacy_closed(answer, right) for answer, right in closed_words]),
        "legacy_open": mean([legacy_open(answer, right) for answer, right in open_words]),
    }


def mean(values: Sequence[float]) -> Score:
    """The mean of what was counted, None where there is nothing."""
    return Score(value=sum(values) / len(values) if values else None, n=len(values))
