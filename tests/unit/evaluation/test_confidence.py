"""Calibration and coverage, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgemed.documents.evaluation import Item
from edgemed.errors import EdgemedError
from edgemed.evaluation.confidence import (
    brier,
    calibration_error,
    coverage,
    probabilities,
    reliability,
    summary,
)


def item(gold: int, answer: int, *shares: float) -> Item:
    scores = [math.log(share) if share else -math.inf for share in shares]
    return with_scores("q", *scores, gold=gold, answer=answer)


def with_scores(name: str, *scores: float, gold: int = 0, answer: int = -1) -> Item:
    return Item(id=name, gold=gold, answer=answer, scores=scores, groups={})


def test_softmax_of_log_scores() -> None:
    assert np.allclose(probabilities(item(0, 0, 0.2, 0.3, 0.5)), (0.2, 0.3, 0.5))
    assert np.allclose(
        probabilities(with_scores("q", -1000.0, -1000.0 + math.log(3))), (0.25, 0.75)
    )
    # Three votes for the first option, none for the second.
    assert probabilities(item(0, 0, 3, 0)).tolist() == [1, 0]
    for scores in ([float("nan"), 0.0], [-math.inf, -math.inf], [math.inf, 0.0]):
        with pytest.raises(EdgemedError, match="item q7: the scores .* are not log scores"):
            probabilities(with_scores("q7", *scores))


def test_brier_by_hand() -> None:
    assert brier([np.array([0.2, 0.3, 0.5]), np.array([1.0, 0.0])], [2, 1]) == pytest.approx(
        ((0.04 + 0.09 + 0.25) + 2) / 2
    )
    assert brier([np.array([0.0, 1.0])], [1]) == 0
    assert brier([], []) is None


def test_bins_hold_equally_many() -> None:
    confidence = np.arange(1, 101)[::-1] / 100
    right = np.arange(100)[::-1] % 4 != 0
    bins = reliability(confidence, right, most=4)
    assert [part.n for part in bins] == [25] * 4
    assert bins[0].confidence == pytest.approx(0.13)
    assert bins[3].confidence == pytest.approx(0.88)
    assert calibration_error(bins) == pytest.approx(
        np.mean(
            [
                abs(np.mean([i % 4 != 0 for i in block]) - np.mean([(i + 1) / 100 for i in block]))
                for block in np.arange(100).reshape(4, 25)
            ]
        )
    )
    assert len(reliability(confidence, right)) == 5
    assert len(reliability(confidence[:19], right[:19])) == 1


def test_answers_of_one_confidence_stay_together() -> None:
    """Whatever their order: else shuffling the items would change the error."""
    confidence = np.array([0.4] * 30 + [0.8] * 10)
    right = np.array([True] * 15 + [False] * 15 + [True] * 8 + [False] * 2)
    shuffled = np.random.default_rng(0).permutation(40)
    bins = reliability(confidence, right, most=4, least=10)
    assert bins == reliability(confidence[shuffled], right[shuffled], most=4, least=10)
    assert [(part.n, part.accuracy) for part in bins] == [
        (30, 0.5),
        (10, 0.8),
    ]
    assert calibration_error(bins) == pytest.approx(0.75 * 0.1)


def test_coverage_takes_the_largest_share_that_keeps_the_target() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    # 1/1, 1/2, 2/3, 3/4, 4/5: below 0.75 on the way, and above it again.
    assert coverage(confidence, np.array([1, 0, 1, 1, 1], bool), 5, 0.75).to_json() == {
        "target": 0.75,
        "coverage": 1.0,
        "threshold": 0.5,
        "accuracy": 0.8,
    }
    assert coverage(confidence, np.array([1, 1, 1, 0, 0], bool), 10, 0.75).to_json() == {
        "target": 0.75,
        "coverage": 0.4,
        "threshold": 0.6,
        "accuracy": 0.75,
    }
    assert coverage(confidence, np.array([0, 1, 0, 1, 0], bool), 5, 0.95).to_json() == {
        "target": 0.95,
        "coverage": 0.0,
        "threshold": None,
        "accuracy": None,
    }
    # A threshold cannot take the right one of two equally confident answers and leave the wrong
    # one.
    assert coverage(np.array([0.9, 0.9]), np.array([True, False]), 2, 0.95).coverage == 0


def test_summary() -> None:
    items = [item(0, 0, 0.9, 0.1)] * 30 + [item(1, 0, 0.6, 0.4)] * 10 + [with_scores("x")] * 10
    found = summary(items).to_json()
    assert (found["n"], found["left_out"]) == (40, 10)
    assert found["ece"] == pytest.approx(0.75 * 0.1 + 0.25 * 0.6)
    assert found["brier"] == pytest.approx(0.75 * 0.02 + 0.25 * 0.72)
    assert found["coverage"] == {
        "target": 0.95,
        "coverage": 0.6,
        "threshold": pytest.approx(0.9),
        "accuracy": 1.0,
    }
    # An answer that could not be read is wrong even where the scores name the gold option.
    assert summary([item(0, -1, 0.9, 0.1)]).to_json()["bins"] == [
        {"confidence": pytest.approx(0.9), "accuracy": 0.0, "n": 1}
    ]


def test_summary_of_nothing_and_of_one_option() -> None:
    nothing = {
        "n": 0,
        "left_out": 1,
        "ece": None,
        "brier": None,
        "bins": [],
        "coverage": {"target": 0.95, "coverage": 0.0, "threshold": None, "accuracy": None},
    }
    assert summary([with_scores("x")]).to_json() == nothing
    alone = summary([item(0, 0, 1.0)]).to_json()
    assert (alone["ece"], alone["brier"], alone["coverage"]["coverage"]) == (0, 0, 1)
