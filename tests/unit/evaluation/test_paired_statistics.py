"""The statistics behind the verdict: against scipy, statsmodels and published examples, and the
gate's error rates by exact enumeration.

Published numbers are typed in from the sources named beside them; where a paper's own table was not
at hand, the software that reproduces it is named.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, lru_cache

import numpy as np
import pytest

from edgemed.documents.evaluation import Difference, Item, NonInferiority, Paired
from edgemed.errors import EdgemedError
from edgemed.evaluation import exact_tests, paired_statistics

scipy_stats = pytest.importorskip("scipy.stats")


def outcomes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every (only_source, only_engine) that n items allow."""
    lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = lost + gained <= n
    return lost[possible], gained[possible]


def probability(
    lost: np.ndarray, gained: np.ndarray, n: int, p_lost: float, p_gained: float
) -> np.ndarray:
    counts = np.stack([lost, gained, n - lost - gained], -1)
    return scipy_stats.multinomial.pmf(counts, n, [p_lost, p_gained, 1 - p_lost - p_gained])


def item(row: dict) -> Item:
    return Item.from_json({"scores": [], "groups": {}, **row})


def answers(lost: int, gained: int, n: int, both: int = 0) -> tuple[list[Item], list[Item]]:
    """Items with these counts: first the lost, then the gained, then both right, then both
    wrong.
    """
    kinds = (
        [(1, 0)] * lost
        + [(0, 1)] * gained
        + [(1, 1)] * both
        + [(0, 0)] * (n - lost - gained - both)
    )
    return tuple(
        [item({"id": str(i), "gold": 1, "answer": kind[side]}) for i, kind in enumerate(kinds)]
        for side in (0, 1)
    )


# --- against other implementations


def test_wilson() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for k, n, confidence in (
        (0, 1, 0.95),
        (0, 20, 0.95),
        (1, 29, 0.9),
        (150, 200, 0.95),
        (200, 200, 0.99),
        (40_000, 100_000, 0.95),
    ):
        assert np.allclose(
            paired_statistics.wilson(k, n, confidence),
            proportion.proportion_confint(k, n, 1 - confidence, method="wilson"),
            atol=1e-12,
        )
        assert np.allclose(
            paired_statistics.wilson(k, n, confidence),
            scipy_stats.binomtest(k, n).proportion_ci(confidence, method="wilson"),
            atol=1e-12,
        )
    # Newcombe, Statist. Med. 17:857 (1998), Table I, method 3.
    for k, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert np.allclose(paired_statistics.wilson(k, n), (low, high), atol=5.1e-5)


def test_mcnemar() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for lost, gained in (
        (0, 0),
        (0, 1),
        (6, 0),
        (5, 5),
        (3, 12),
        (120, 90),
        (50_500, 49_500),
        (52_000, 48_000),
    ):
        expected = scipy_stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1
        assert paired_statistics.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-6)
        if lost + gained:
            assert paired_statistics.mcnemar(lost, gained) == pytest.approx(
                tables.mcnemar([[9, lost], [gained, 9]], exact=True).pvalue, rel=1e-6
            )


def test_holm() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    random = np.random.default_rng(3)
    for size in (1, 2, 4, 9):
        ps = (random.random(size) ** 3).tolist()
        assert np.allclose(
            paired_statistics.holm(ps), multitest.multipletests(ps, method="holm")[1]
        )
    assert paired_statistics.holm([0.04, 0.01, 0.04]) == [0.08, 0.03, 0.08]


# --- published examples. (a, b, c, d): both, only first, only second, neither; the difference is
# first - second.


@pytest.mark.parametrize(
    ("table", "confidence", "low", "high"),
    [
        # Tango 1998, cross-over trial, as reproduced in ratesci's tests
        ((4, 9, 3, 16), 0.95, -0.027, 0.390),
        # Tango 1998, disinfection of soft contact lenses, likewise
        ((43, 0, 1, 0), 0.90, -0.096, 0.037),
        (
            (53, 16, 8, 9),
            0.95,
            -0.020,
            0.207,
        ),  # Agresti and Min, Statist. Med. 24:729 (2005), likewise
        # Fagerland, Lydersen and Laake, Statist. Med. 33:2850 (2014): airway hyper-responsiveness
        # (Bentur 2009)
        ((1, 1, 7, 12), 0.95, -0.517, -0.026),
        # floppy eyelid syndrome (Ezra 2010), Chang 2024, as reproduced in ratesci's tests
        ((7, 25, 2, 68), 0.95, 0.139, 0.321),
        # complete response (Cavo 2012), R package contingencytables, chapter 8 of the book of the same
        # authors
        ((59, 6, 16, 80), 0.95, -0.1240, -0.0054),
    ],
)
def test_tango(table: tuple[int, ...], confidence: float, low: float, high: float) -> None:
    _, first, second, _ = table
    assert np.allclose(
        paired_statistics.tango(second, first, sum(table), confidence), (low, high), atol=5.1e-4
    )


# Newcombe, Statist. Med. 17:2635 (1998), Table III, method 10. One of its 36 limits (0.8736, lower,
# of 1 97 1 1) is left out: by the paper's own definition it equals method 8's, which the same row
# prints as 0.8737.
NEWCOMBE = [
    ((36, 12, 2, 0), 0.0569, 0.3404),
    ((20, 12, 2, 16), 0.0562, 0.3292),
    ((18, 12, 2, 18), 0.0562, 0.3290),
    ((36, 14, 0, 0), 0.1528, 0.4167),
    ((35, 14, 0, 1), 0.1461, 0.4175),
    ((18, 14, 0, 18), 0.1441, 0.3963),
    ((2, 97, 1, 0), 0.8721, 0.9854),
    ((1, 97, 1, 1), None, 0.9850),
    ((0, 29, 1, 0), 0.6666, 0.9882),
    ((2, 98, 0, 0), 0.9178, 0.9945),
    ((1, 98, 0, 1), 0.9171, 0.9916),
    ((0, 30, 0, 0), 0.8395, 1.0),
    ((54, 0, 0, 0), -0.0664, 0.0664),
    ((53, 0, 0, 1), -0.0729, 0.0729),
    ((30, 0, 0, 24), -0.0358, 0.0358),
    ((29, 0, 0, 25), -0.0354, 0.0354),
    ((28, 0, 0, 26), -0.0352, 0.0352),
    ((27, 0, 0, 27), -0.0351, 0.0351),
]


@pytest.mark.parametrize(("table", "low", "high"), NEWCOMBE)
def test_newcombe(table: tuple[int, ...], low: float | None, high: float) -> None:
    both, first, second, neither = table
    found = paired_statistics.newcombe(both, second, first, neither)
    assert found[1] == pytest.approx(high, abs=5.1e-5)
    assert low is None or found[0] == pytest.approx(low, abs=5.1e-5)


def test_newcombe_other_source() -> None:
    # Fagerland, Lydersen and Laake 2014, and the R package contingencytables (test-ch8.R).
    assert np.allclose(paired_statistics.newcombe(1, 7, 1, 12), (-0.507, -0.026), atol=5.1e-4)
    assert np.allclose(paired_statistics.newcombe(59, 16, 6, 80), (-0.1186, -0.0046), atol=5.1e-5)


# --- the score statistic and the exact test


def test_score_without_margin_is_mcnemars() -> None:
    assert exact_tests.score(5, 12, 40, 0.0) == pytest.approx(7 / np.sqrt(17))
    assert exact_tests.score(0, 0, 40, 0.0) == 0
    # With no changed answer the variance under H0 is that of a binomial with one kind of change
    # only.
    assert exact_tests.score(0, 0, 100, 0.04) == pytest.approx(4 / np.sqrt(100 * 0.04 * 0.96))


@pytest.mark.parametrize("loss", [-0.9, -0.2, -0.02, 0.0, 0.001, 0.02, 0.1, 0.5])
def test_score_grows_with_every_gain_and_falls_with_every_loss(loss: float) -> None:
    """What makes the worst truth under H0 lie on its border, and the upper bound of each cell an
    upper bound.
    """
    for n in (7, 40, 90):
        lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
        z = np.where(lost + gained <= n, exact_tests.score(lost, gained, n, loss), np.nan)
        with np.errstate(invalid="ignore"):
            assert np.nanmax(z[1:] - z[:-1]) <= 1e-9
            assert np.nanmin(z[:, 1:] - z[:, :-1]) >= -1e-9


def test_region_is_the_sum_over_all_outcomes() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        n = int(random.integers(2, 90))
        lost, gained, _ = map(int, random.multinomial(n, random.dirichlet([1, 1, 3])))
        loss = float(random.uniform(-0.5, 0.5))
        changed = random.uniform(abs(loss), 1, 2)
        all_lost, all_gained = outcomes(n)
        inside = (
            exact_tests.score(all_lost, all_gained, n, loss)
            >= exact_tests.score(lost, gained, n, loss) - 1e-9
        )
        found = exact_tests.region(
            lost, gained, n, loss, (changed + loss) / 2, (changed - loss) / 2
        )
        for share, p in zip(changed, found, strict=True):
            assert p == pytest.approx(
                probability(all_lost, all_gained, n, (share + loss) / 2, (share - loss) / 2)[
                    inside
                ].sum(),
                abs=1e-9,
            )


def test_no_changed_answer() -> None:
    """By hand: where every change is a loss, nothing changes with probability 0.98^n, which falls
    below 5 % at n = 149.
    """
    assert (
        0.98**149
        < exact_tests.p_loss_at_least(0, 0, 149, 0.02)
        <= 0.05
        < 0.98**148
        < exact_tests.p_loss_at_least(0, 0, 148, 0.02)
    )
    assert paired_statistics.items_needed(0, 0, 20, 0.02, 0.05) == 149


def critical(n: int, margin: float, alpha: float, inferior: bool) -> tuple[np.ndarray, np.ndarray]:
    """The outcomes in which the engine passes (or fails), of all that n items allow. p falls with
    every loss replaced by a gain.
    """
    found = []
    most = -1
    for changed in range(n + 1):
        # Enough to look near the previous border: it moves by at most a few.
        def p(k: int, changed: int = changed) -> float:
            return exact_tests.p_loss_at_least(k, changed - k, n, -margin if inferior else margin)

        while most < changed and p(most + 1) <= alpha:
            most += 1
        while most >= 0 and p(most) > alpha:
            most -= 1
        found += [(k, changed - k) for k in range(most + 1)]
    pairs = np.array(found).reshape(-1, 2)
    return (pairs[:, 1], pairs[:, 0]) if inferior else (pairs[:, 0], pairs[:, 1])


def worst_rate(lost: np.ndarray, gained: np.ndarray, n: int, margin: float) -> float:
    """The largest probability of these outcomes where the true loss is exactly the margin, over the
    share of changed answers.
    """
    shares = np.linspace(np.sqrt(margin), 1, 200) ** 2
    return max(
        probability(lost, gained, n, (share + margin) / 2, max(0.0, (share - margin) / 2)).sum()
        for share in shares
    )


@pytest.mark.parametrize(
    ("n", "margin", "alpha"),
    [(10, 0.1, 0.05), (20, 0.02, 0.05), (50, 0.05, 0.05), (50, 0.1, 0.0125), (133, 0.02, 0.05)],
)
def test_wrong_verdicts_are_at_most_alpha(n: int, margin: float, alpha: float) -> None:
    """Size by enumeration of every outcome, for passing and for failing. The plain score test is
    the control: it must be seen to break its level.
    """
    for inferior in (False, True):
        assert worst_rate(*critical(n, margin, alpha, inferior), n, margin) <= alpha
    if n == 133:
        lost, gained = outcomes(n)
        plain = exact_tests.score(lost, gained, n, margin) >= scipy_stats.norm.isf(alpha)
        assert worst_rate(lost[plain], gained[plain], n, margin) > 1.3 * alpha


def test_gate_of_four_bad_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four engines that lose exactly the margin, on the same items: a pass among them, and a fail
    among them, at most in alpha of all runs.
    """
    monkeypatch.setattr(paired_statistics, "items_needed", lambda *_: None)
    n = 120
    margin = 0.05
    alpha = 0.05
    runs = 1500

    @cache
    def pair(lost: int, gained: int) -> Paired:
        test = NonInferiority(
            margin=margin,
            alpha=alpha,
            lower=0,
            upper=0,
            p=exact_tests.p_loss_at_least(lost, gained, n, margin),
            p_inferior=exact_tests.p_loss_at_least(gained, lost, n, -margin),
        )
        return Paired(
            n=n,
            only_source=lost,
            only_engine=gained,
            changed_both_wrong=0,
            difference=Difference(value=(gained - lost) / n, interval=(0, 0), method=""),
            mcnemar_p=1,
            minimum_detectable=0,
            noninferiority=test,
            items_needed=None,
            subgroups=(),
            worst=None,
        )

    random = np.random.default_rng(7)
    rates = {"pass": 0, "fail": 0}
    for _ in range(runs):
        # Half of each item's luck is shared, so the engines are correlated as real ones are.
        shared = random.normal(size=n)
        own = random.normal(size=(4, n))
        luck = scipy_stats.norm.cdf((shared + own) / np.sqrt(2))
        counts = [(int((u < 0.09).sum()), int((u > 0.96).sum())) for u in luck]
        verdicts = {
            row.verdict
            for row in paired_statistics.gate(
                [(("e", "t", "s"), pair(*c)) for c in counts], margin, alpha
            ).comparisons
        }
        for verdict in rates:
            rates[verdict] += verdict in verdicts
    limit = alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
    assert 0 < rates["pass"] / runs <= limit
    assert 0 < rates["fail"] / runs <= limit


def test_lower_limit_covers() -> None:
    """Coverage by enumeration: the true difference lies below the limit in at most alpha of all
    draws.
    """
    n = 12
    alpha = 0.1
    lost, gained = outcomes(n)
    limits = np.array(
        [
            exact_tests.lower_limit(int(b), int(c), n, alpha, -0.1)
            for b, c in zip(lost, gained, strict=True)
        ]
    )
    for p_lost, p_gained in (
        (0.1, 0),
        (0.1, 0.1),
        (0.3, 0.1),
        (0.1, 0.3),
        (0.5, 0.5),
        (0, 0.2),
        (0.9, 0.05),
    ):
        assert (
            probability(lost, gained, n, p_lost, p_gained)[limits > p_gained - p_lost + 1e-9].sum()
            <= alpha
        )


@pytest.mark.parametrize(
    ("lost", "gained", "n"),
    [(0, 0, 149), (0, 0, 148), (2, 1, 200), (10, 3, 200), (30, 5, 200), (0, 6, 60), (9, 9, 40)],
)
def test_limits_agree_with_the_tests(lost: int, gained: int, n: int) -> None:
    made = paired_statistics.paired(*answers(lost, gained, n), 0.02, 0.05).to_json()[
        "noninferiority"
    ]
    assert (made["lower"] >= -0.02) == (made["p"] <= 0.05)
    assert (made["upper"] <= -0.02) == (made["p_inferior"] <= 0.05)
    assert made["lower"] < (gained - lost) / n < made["upper"]


# --- sizes


@pytest.mark.parametrize(
    ("lost", "gained", "n", "margin", "alpha"),
    [
        (2, 1, 200, 0.02, 0.05),
        (4, 4, 40, 0.1, 0.05),
        (5, 0, 50, 0.05, 0.05),
        (30, 2, 200, 0.1, 0.0125),
    ],
)
def test_items_needed_decide_in_four_of_five(
    lost: int, gained: int, n: int, margin: float, alpha: float
) -> None:
    assert paired_statistics.decided(lost, gained, n, margin, alpha) is None
    size = paired_statistics.items_needed(lost, gained, n, margin, alpha)
    decided = lru_cache(maxsize=None)(
        lambda b, c: paired_statistics.decided(b, c, size, margin, alpha) is not None
    )
    draws = np.random.default_rng(1).multinomial(
        size, [lost / n, gained / n, 1 - (lost + gained) / n], 300
    )
    assert 0.7 < np.mean([decided(int(b), int(c)) for b, c, _ in draws]) < 0.9


def test_no_number_of_items_decides_a_loss_of_the_margin() -> None:
    assert paired_statistics.items_needed(4, 0, 200, 0.02, 0.05) is None
    assert paired_statistics.items_needed(9, 3, 300, 0.02, 0.05) is None


@pytest.mark.parametrize(
    ("changed", "n", "alpha", "most"),
    [(20, 200, 0.05, 0.9), (60, 300, 0.01, 0.9), (0, 400, 0.05, 0.99)],
)
def test_minimum_detectable_is_found_in_four_of_five(
    changed: int, n: int, alpha: float, most: float
) -> None:
    """Or more often, where no answer changed: there the approximation names a loss somewhat larger
    than needed.
    """
    loss = paired_statistics.minimum_detectable(changed, n, alpha)
    share = max(changed / n, loss)
    found = lru_cache(maxsize=None)(lambda b, c: exact_tests.p_loss_at_least(c, b, n, 0.0) <= alpha)
    draws = np.random.default_rng(2).multinomial(
        n, [(share + loss) / 2, (share - loss) / 2, 1 - share], 300
    )
    assert 0.7 < np.mean([found(int(b), int(c)) for b, c, _ in draws]) < most


def test_minimum_detectable_of_hardly_any_items() -> None:
    assert paired_statistics.minimum_detectable(0, 2, 0.05) is None
    assert 0.5 < paired_statistics.minimum_detectable(0, 6, 0.05) < 1


# --- paired and gate


def test_paired_counts_by_hand() -> None:
    golds = [0, 1, 2, 0, 1, 2, 3, 0]
    source = [0, 1, 0, 1, 1, 0, 3, 2]
    engine = [0, 0, 2, 2, 1, 0, -1, 2]
    subjects = ["a", "a", "a", "b", "b", "b", "b", "b"]
    made = [
        [
            Item(
                id=f"q{i}",
                gold=g,
                answer=a,
                scores=(),
                groups={"subject": s, "language": "en"},
            )
            for i, (g, a, s) in enumerate(zip(golds, side, subjects, strict=True))
        ]
        for side in (source, engine)
    ]
    found = paired_statistics.paired(*made, 0.1, 0.05).to_json()
    expected = {
        "n": 8,
        "both": 2,
        "only_source": 2,
        "only_engine": 1,
        "neither": 3,
        "changed": 4,
        "changed_both_wrong": 1,
        "source_correct": 4,
        "engine_correct": 3,
        "verdict": "undecided",
        "worst": None,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["difference"] == {
        "value": -0.125,
        "interval": list(paired_statistics.tango(2, 1, 8)),
        "method": "Tango score, 95 %",
    }
    assert found["newcombe"] == list(paired_statistics.newcombe(2, 2, 1, 3))
    assert [
        (
            row["value"],
            row["n"],
            row["source"],
            row["engine"],
            row["only_source"],
            row["only_engine"],
        )
        for row in found["subgroups"]
    ] == [
        ("a", 3, 2 / 3, 2 / 3, 1, 1),
        ("b", 5, 0.4, 0.2, 1, 0),
    ]
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        *expected,
        "difference",
        "newcombe",
        "mcnemar_p",
        "noninferiority",
        "minimum_detectable",
        "items_needed",
        "subgroups",
    }


def test_worst_subgroup_needs_ten_items_and_ties_go_to_the_larger() -> None:
    source, engine = answers(0, 0, 60, both=60)
    for items in (source, engine):
        for i, each in enumerate(items):
            subject = "tiny" if i < 5 else "small" if i < 15 else "large" if i < 35 else "fine"
            items[i] = replace(each, groups={"subject": subject})
    for i in (0, 1, 2, 5, 15, 16):
        engine[i] = replace(engine[i], answer=0)
    found = paired_statistics.paired(source, engine, 0.02, 0.05).to_json()
    assert found["worst"]["value"] == "large"
    assert found["worst"]["difference"] == -0.1
    assert min(row["difference"] for row in found["subgroups"]) == -0.6


@pytest.mark.parametrize(
    ("lost", "gained", "n", "verdict"),
    [
        (0, 0, 149, "pass"),
        (0, 0, 148, "undecided"),
        (0, 30, 30, "pass"),
        (30, 0, 30, "fail"),
        (15, 15, 30, "undecided"),
        (1, 0, 1, "undecided"),
    ],
)
def test_degenerate_tables(lost: int, gained: int, n: int, verdict: str) -> None:
    found = paired_statistics.paired(*answers(lost, gained, n), 0.02, 0.05).to_json()
    assert found["verdict"] == verdict
    assert (found["items_needed"] is None) == (verdict != "undecided")
    numbers = [
        *found["difference"]["interval"],
        *found["newcombe"],
        *(found["noninferiority"][key] for key in ("lower", "upper", "p", "p_inferior")),
    ]
    assert np.isfinite(numbers).all()
    assert min(numbers) >= -1
    assert max(numbers) <= 1
    assert (
        found["difference"]["interval"][0]
        <= found["difference"]["value"]
        <= found["difference"]["interval"][1]
    )


def test_paired_refuses() -> None:
    source, engine = answers(1, 1, 4)
    for margin, alpha, said in (
        (0, 0.05, "margin of 0"),
        (1, 0.05, "margin of 1"),
        (0.02, 0, "alpha 0"),
        (0.02, 0.6, "alpha 0.6"),
        (float("nan"), 0.05, "margin of nan"),
    ):
        with pytest.raises(EdgemedError, match=said):
            paired_statistics.paired(source, engine, margin, alpha)
        with pytest.raises(EdgemedError, match=said):
            paired_statistics.gate([], margin, alpha)
    with pytest.raises(EdgemedError, match="no items"):
        paired_statistics.paired([], [], 0.02, 0.05)
    with pytest.raises(EdgemedError, match="no items"):
        paired_statistics.wilson(0, 0)
    with pytest.raises(EdgemedError, match="4 items of the source, 3 of the engine"):
        paired_statistics.paired(source, engine[:3], 0.02, 0.05)
    with pytest.raises(EdgemedError, match="item 3: id '2' of the source, 'x' of the engine"):
        paired_statistics.paired(
            source,
            [*engine[:2], replace(engine[2], id="x"), replace(engine[3], gold=7)],
            0.02,
            0.05,
        )
    with pytest.raises(EdgemedError, match="item 4: gold 1 of the source, 7 of the engine"):
        paired_statistics.paired(source, [*engine[:3], replace(engine[3], gold=7)], 0.02, 0.05)


def test_gate() -> None:
    pairs = {
        name: paired_statistics.paired(*answers(*counts), 0.02, 0.05)
        for name, counts in {
            "same": (0, 0, 400),
            "close": (0, 0, 160),
            "bad": (40, 0, 400),
            "few": (1, 1, 20),
        }.items()
    }
    assert [pair.verdict for pair in pairs.values()] == ["pass", "pass", "fail", "undecided"]

    def judge(*names: str) -> dict:
        return paired_statistics.gate(
            [((name, "medqa", "zero-shot"), pairs[name]) for name in names], 0.02, 0.05
        ).to_json()

    assert judge("same")["verdict"] == judge("close")["verdict"] == "pass"
    assert judge("same")["correction"] == "Holm over 1 comparison"
    # 0.98^160 is 0.039: enough alone, and as the last of Holm's steps, but not as the first of two.
    assert judge("close", "same")["verdict"] == "pass"
    assert judge("close", "close")["verdict"] == "undecided"
    found = judge("same", "bad", "few")
    assert found["verdict"] == "fail"
    assert found["correction"] == "Holm over 3 comparisons"
    assert [row["verdict"] for row in found["comparisons"]] == ["pass", "fail", "undecided"]
    assert [row["items_needed"] is None for row in found["comparisons"]] == [True, True, False]
    assert found["comparisons"][2]["items_needed"] > pairs["few"].items_needed
    row = found["comparisons"][0]
    assert (row["engine"], row["task"], row["strategy"], row["n"], row["p_holm"]) == (
        "same",
        "medqa",
        "zero-shot",
        400,
        pytest.approx(3 * row["p"]),
    )
    assert set(row) == {
        "engine",
        "task",
        "strategy",
        "n",
        "verdict",
        "difference",
        "interval",
        "lower",
        "p",
        "p_holm",
        "p_inferior_holm",
        "items_needed",
        "minimum_detectable",
    }
    with pytest.raises(EdgemedError, match="nothing to compare"):
        paired_statistics.gate([], 0.02, 0.05)
    with pytest.raises(EdgemedError, match="same medqa zero-shot was compared at margin 0.02"):
        paired_statistics.gate([(("same", "medqa", "zero-shot"), pairs["same"])], 0.03, 0.05)
