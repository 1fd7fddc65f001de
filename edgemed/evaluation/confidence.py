"""What a model's confidence is worth: expected calibration error, Brier score, and how many answers
a confidence threshold can release.

Confidence is the largest softmax probability over the option scores. Bins hold equally many
answers, because language models are mostly sure: bins of equal width would be empty at one end and
hide the error at the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgemed.documents.evaluation import Bin, Calibration, Coverage, Item
from edgemed.errors import EdgemedError


def summary(items: Sequence[Item], target: float = 0.95) -> Calibration:
    """The calibration of a result. An answer that could not be read (-1) counts as wrong.

    Items without scores are left out and counted, and where none has scores ece and brier are None.
    Raises EdgemedError for scores that are not numbers.
    """
    scored = [item for item in items if len(item.scores)]
    shares = [probabilities(item) for item in scored]
    confidence = np.array([p.max() for p in shares])
    right = np.array([item.answer == item.gold for item in scored], dtype=bool)
    bins = reliability(confidence, right)
    return Calibration(
        n=len(scored),
        left_out=len(items) - len(scored),
        ece=calibration_error(bins),
        brier=brier(shares, [item.gold for item in scored]),
        bins=tuple(bins),
        coverage=coverage(confidence, right, len(items), target),
    )


def probabilities(item: Item) -> np.ndarray:
    """Softmax over the option scores, float64 [options]. A score of -inf (no vote at all) is
    probability 0.
    """
    scores = np.asarray(item.scores, float)
    if not np.isfinite(scores.max()):
        raise EdgemedError(
            f"item {item.id}: the scores {list(item.scores)} are not log scores",
            "Evaluate again, and verify the engine first",
        )
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def reliability(
    confidence: np.ndarray, right: np.ndarray, most: int = 10, least: int = 20
) -> list[Bin]:
    """Bins of equally many answers, lowest confidence first. confidence: float [n]; right: bool
    [n].

    At most `most` bins, each of about `least` answers or more; answers of one confidence are never
    split, so bins can be fewer and unequal.
    """
    if not len(confidence):
        return []
    order = np.argsort(confidence, kind="stable")
    confidence = confidence[order]
    right = right[order]
    count = min(most, max(1, len(confidence) // least))
    cuts = np.unique(
        np.searchsorted(confidence, confidence[np.arange(1, count) * len(confidence) // count])
    )
    pieces = zip(np.split(confidence, cuts), np.split(right, cuts), strict=True)
    return [
        Bin(confidence=float(c.mean()), accuracy=float(r.mean()), n=len(c))
        for c, r in pieces
        if len(c)
    ]


def calibration_error(bins: Sequence[Bin]) -> float | None:
    """Expected calibration error over adaptive bins: the mean of |accuracy - confidence|, weighted
    by n (Nguyen and O'Connor, EMNLP 2015).
    """
    total = sum(part.n for part in bins)
    if not total:
        return None
    return sum(part.n * abs(part.accuracy - part.confidence) for part in bins) / total


def brier(shares: Sequence[np.ndarray], golds: Sequence[int]) -> float | None:
    """Mean of the squared distance between the option probabilities and the truth: 0 is perfect, 2
    the worst (Brier, Mon. Weather Rev. 78:1, 1950).
    """
    if not shares:
        return None
    distances = []
    for probability, gold in zip(shares, golds, strict=True):
        truth = np.eye(len(probability))[gold]
        distances.append(((probability - truth) ** 2).sum())
    return float(np.mean(distances))


def coverage(confidence: np.ndarray, right: np.ndarray, questions: int, target: float) -> Coverage:
    """The largest share of all `questions` that can be answered above one confidence threshold with
    accuracy >= target among those answered.

    coverage 0, and threshold and accuracy None, where no threshold reaches the target. The
    threshold is chosen on the very answers it is judged on, so it flatters a little; on new
    questions expect less.
    """
    order = np.argsort(-confidence, kind="stable")
    sure = confidence[order]
    hits = np.cumsum(right[order])
    # A threshold takes all answers of one confidence or none.
    ends = np.array([], int)
    if len(sure):
        ends = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    good = [end for end in ends if hits[end] >= target * (end + 1) - 1e-9]
    if not good:
        return Coverage(target=target, coverage=0.0, threshold=None, accuracy=None)
    last = int(good[-1])
    return Coverage(
        target=target,
        coverage=(last + 1) / questions,
        threshold=float(sure[last]),
        accuracy=float(hits[last] / (last + 1)),
    )
