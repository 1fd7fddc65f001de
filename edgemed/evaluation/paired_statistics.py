"""Is the engine worse than its source? Paired statistics on the same items, and the gate that says
pass, fail or undecided.

An engine passes only where a loss beyond the margin is ruled out, fails only where it is shown, and
is undecided otherwise: too few items never pass. The tests behind pass and fail are exact
(exact.py); intervals and needed sizes are the usual approximations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.evaluation.exact_tests import lower_limit, null_variance, p_loss_at_least, score

Items = Sequence[Mapping[str, Any]]
POWER = 0.8
SMALLEST_GROUP = 10  # below it a subgroup is listed but never named the worst


def wilson(k: int, n: int, confidence: float = 0.95) -> list[float]:
    """Score interval of a proportion k / n: [low, high] (Wilson, JASA 22:209, 1927). Raises
    EdgemedError for n = 0.
    """
    if n < 1:
        raise EdgemedError("no items: there is no accuracy of nothing", "Give at least one item")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = k / n
    shrink = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [0.0 if k == 0 else middle - half, 1.0 if k == n else middle + half]


def mcnemar(only_source: int, only_engine: int) -> float:
    """Exact two-sided McNemar p of 'as many answers lost as gained': twice the smaller
    binomial(1/2) tail, at most 1 (no changed answer: 1).
    """
    n = only_source + only_engine
    k = min(only_source, only_engine)
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def tango(only_source: int, only_engine: int, n: int, confidence: float = 0.95) -> list[float]:
    """Score interval of the paired difference engine - source: [low, high] (Tango, Statist. Med.
    17:891, 1998), by bisection to 1e-9.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)

    def end(lost: int, gained: int) -> float:
        """The largest loss that is not rejected."""
        low = (lost - gained) / n
        high = 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            if score(lost, gained, n, middle) <= z:
                low = middle
            else:
                high = middle
        return low

    return [-end(only_source, only_engine), end(only_engine, only_source)]


def newcombe(
    both: int, only_source: int, only_engine: int, neither: int, confidence: float = 0.95
) -> list[float]:
    """Square-and-add interval of the paired difference engine - source: [low, high] (Newcombe,
    Statist. Med. 17:2635, 1998, method 10).
    """
    n = both + only_source + only_engine + neither
    engine = both + only_engine
    source = both + only_source
    low1, high1 = wilson(engine, n, confidence)
    low2, high2 = wilson(source, n, confidence)
    p1 = engine / n
    p2 = source / n
    together = float(both * neither - only_source * only_engine)
    if together > 0:
        together = max(together - n / 2, 0)
    margins = engine * (n - engine) * source * (n - source)
    correlation = together / math.sqrt(margins) if margins else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    return [p1 - p2 - distance(p1 - low1, high2 - p2), p1 - p2 + distance(high1 - p1, p2 - low2)]


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for testing all of them, in the order given (Holm, Scand. J. Statist. 6:65,
    1979).
    """
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for step, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - step) * ps[i]))
        adjusted[i] = largest
    return adjusted


def minimum_detectable(changed: int, n: int, alpha: float) -> float | None:
    """The smallest true loss that a one-sided test of 'no loss' at alpha finds with probability
    0.8, if this share of answers changes.

    Normal approximation (Connor, Biometrics 43:207, 1987): sqrt(n) loss = z(alpha) sqrt(changed) +
    z(power) sqrt(changed - loss^2), with at least `loss` of the answers changed. None where n is
    too small for any loss.
    """
    za = NormalDist().inv_cdf(1 - alpha)
    zb = NormalDist().inv_cdf(POWER)

    def detected(loss: float) -> bool:
        share = max(changed / n, loss)
        return math.sqrt(n) * loss >= za * math.sqrt(share) + zb * math.sqrt(share - loss * loss)

    if not detected(1.0):
        return None
    low = 0.0
    high = 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if detected(middle):
            high = middle
        else:
            low = middle
    return high


def items_needed(
    only_source: int, only_engine: int, n: int, margin: float, alpha: float
) -> int | None:
    """Items at which the gate would decide with power 0.8, if the observed shares of lost and
    gained answers are the true ones.

    Normal approximation with the variance under H0 (Nam, Biometrics 53:1422, 1997), raised until
    the expected counts themselves decide in the exact test. None where the observed loss is the
    margin itself: no number decides that.
    """
    lost = only_source / n
    gained = only_engine / n
    distance = margin - (lost - gained)
    if only_source - only_engine == margin * n or abs(distance) < 1e-9:
        return None
    za = NormalDist().inv_cdf(1 - alpha)
    zb = NormalDist().inv_cdf(POWER)
    under_h0 = null_variance(only_source, only_engine, n, margin) / n
    size = (
        za * math.sqrt(under_h0) + zb * math.sqrt(max(0.0, lost + gained - (lost - gained) ** 2))
    ) ** 2 / distance**2
    size = max(math.ceil(size), n + 1)
    # A normal approximation of a handful of items promises too much; of many it does not.
    while size < 50_000 and not decided(
        round(size * lost), round(size * gained), size, margin, alpha
    ):
        size += max(1, size // 200)
    return size


def decided(only_source: int, only_engine: int, n: int, margin: float, alpha: float) -> str | None:
    """'pass', 'fail' or None, by the exact tests of a loss of at least, and of at most, the
    margin.
    """
    if p_loss_at_least(only_source, only_engine, n, margin) <= alpha:
        return "pass"
    return "fail" if p_loss_at_least(only_engine, only_source, n, -margin) <= alpha else None


def check(margin: float | None, alpha: float) -> None:
    """Raises EdgemedError for a margin outside (0, 1) or an alpha outside (0, 0.5]."""
    if margin is not None and not 0 < margin < 1:
        raise EdgemedError(
            f"a margin of {margin} is not a share between 0 and 1",
            "Give the accuracy that may be lost, such as 0.02",
        )
    if not 0 < alpha <= 0.5:
        raise EdgemedError(
            f"alpha {alpha} is not in (0, 0.5]",
            "Give the accepted risk of passing a bad engine, such as 0.05",
        )


def paired(
    source_items: Items,
    engine_items: Items,
    margin: float | None,
    alpha: float,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Engine against source on the same items (dicts with id, gold, answer and optional groups;
    answer -1 is wrong), as docs/measuring.md describes.

    All shares are fractions of 1, differences are engine - source, and the verdict is that of this
    comparison alone: gate() corrects for several. margin None: nobody said how much may be lost, so
    nothing is judged (noninferiority, items_needed and verdict are None). Raises EdgemedError for
    no items, items that differ in id or gold, and margin or alpha out of range.
    """
    check(margin, alpha)
    same_items(source_items, engine_items)
    right = [
        (s["answer"] == s["gold"], e["answer"] == e["gold"])
        for s, e in zip(source_items, engine_items, strict=True)
    ]
    # Two wrong answers to an open question have one number; their words tell them apart.
    changed = [
        (s["answer"], s.get("said")) != (e["answer"], e.get("said"))
        for s, e in zip(source_items, engine_items, strict=True)
    ]
    n = len(right)
    both = right.count((True, True))
    neither = right.count((False, False))
    lost = right.count((True, False))
    gained = right.count((False, True))
    rows = list(subgroups(source_items, right, confidence))
    named = [row for row in rows if row["n"] >= SMALLEST_GROUP]
    return {
        "n": n,
        "both": both,
        "only_source": lost,
        "only_engine": gained,
        "neither": neither,
        "changed": sum(changed),
        "changed_both_wrong": sum(
            c and pair == (False, False) for c, pair in zip(changed, right, strict=True)
        ),
        "source_correct": both + lost,
        "engine_correct": both + gained,
        "difference": {
            "value": (gained - lost) / n,
            "interval": tango(lost, gained, n, confidence),
            "method": f"Tango score, {100 * confidence:g} %",
        },
        "newcombe": newcombe(both, lost, gained, neither, confidence),
        "mcnemar_p": mcnemar(lost, gained),
        "minimum_detectable": minimum_detectable(lost + gained, n, alpha),
        **judged(lost, gained, n, margin, alpha),
        "subgroups": rows,
        "worst": min(named, key=lambda row: (row["difference"], -row["n"]), default=None),
    }


def judged(lost: int, gained: int, n: int, margin: float | None, alpha: float) -> dict[str, Any]:
    """The verdict on one comparison with its evidence; all None where there is no margin."""
    if margin is None:
        return dict.fromkeys(("noninferiority", "items_needed", "verdict"))
    p = p_loss_at_least(lost, gained, n, margin)
    p_inferior = p_loss_at_least(gained, lost, n, -margin)
    verdict = "pass" if p <= alpha else "fail" if p_inferior <= alpha else "undecided"
    limits = {
        "lower": lower_limit(lost, gained, n, alpha, -margin),
        "upper": -lower_limit(gained, lost, n, alpha, margin),
    }
    return {
        "noninferiority": {
            "margin": margin,
            "alpha": alpha,
            **limits,
            "p": p,
            "p_inferior": p_inferior,
        },
        "items_needed": (
            items_needed(lost, gained, n, margin, alpha) if verdict == "undecided" else None
        ),
        "verdict": verdict,
    }


def same_items(source_items: Items, engine_items: Items) -> None:
    """Raises EdgemedError where the two are not the same questions in the same order, naming the
    first difference.
    """
    if len(source_items) != len(engine_items):
        raise EdgemedError(
            f"{len(source_items)} items of the source, {len(engine_items)} of the engine",
            "Evaluate both on the same task file",
        )
    if not source_items:
        raise EdgemedError("no items to compare", "Evaluate at least one question")
    for number, (s, e) in enumerate(zip(source_items, engine_items, strict=True), 1):
        for key in ("id", "gold"):
            if s[key] != e[key]:
                raise EdgemedError(
                    f"item {number}: {key} {s[key]!r} of the source, {e[key]!r} of the engine",
                    "Evaluate both on the same task file",
                )


def subgroups(
    items: Items, right: Sequence[tuple[bool, bool]], confidence: float
) -> Iterator[dict[str, Any]]:
    """One row per value of each group that has several; right: (source, engine) per item. A group
    of one value says nothing new and is left out.
    """
    for group in dict.fromkeys(name for item in items for name in item.get("groups", {})):
        members: dict[str, list[tuple[bool, bool]]] = {}
        for item, pair in zip(items, right, strict=True):
            if group in item.get("groups", {}):
                members.setdefault(item["groups"][group], []).append(pair)
        for value in sorted(members) if len(members) > 1 else []:
            pairs = members[value]
            n = len(pairs)
            lost = pairs.count((True, False))
            gained = pairs.count((False, True))
            yield {
                "group": group,
                "value": value,
                "n": n,
                "source": sum(s for s, _ in pairs) / n,
                "engine": sum(e for _, e in pairs) / n,
                "difference": (gained - lost) / n,
                "interval": tango(lost, gained, n, confidence),
                "only_source": lost,
                "only_engine": gained,
            }


def gate(
    comparisons: Sequence[tuple[tuple[str, str, str], Mapping[str, Any]]],
    margin: float,
    alpha: float,
) -> dict[str, Any]:
    """The verdict over several comparisons [((engine, task, strategy), paired)], Holm-corrected:
    the risk that any bad engine passes is at most alpha.

    'fail' if one fails, else 'undecided' if one is, else 'pass'. Passing and failing are corrected
    as two families. Raises EdgemedError for no comparison, for margin or alpha out of range, and
    for comparisons made at another margin or alpha.
    """
    check(margin, alpha)
    if not comparisons:
        raise EdgemedError(
            "the gate has nothing to compare",
            "Evaluate at least one task on the source and on an engine",
        )
    for name, pair in comparisons:
        test = pair["noninferiority"]
        if (test["margin"], test["alpha"]) != (margin, alpha):
            raise EdgemedError(
                f"{' '.join(name)} was compared at margin {test['margin']}, alpha {test['alpha']};"
                f" the gate asks for {margin}, {alpha}",
                "Compare again",
            )
    passing = holm([pair["noninferiority"]["p"] for _, pair in comparisons])
    failing = holm([pair["noninferiority"]["p_inferior"] for _, pair in comparisons])
    rows = []
    for (engine, task, strategy), pair, p, p_inferior in zip(
        *zip(*comparisons, strict=True), passing, failing, strict=True
    ):
        verdict = "undecided"
        needed = None
        if p <= alpha:
            verdict = "pass"
        elif p_inferior <= alpha:
            verdict = "fail"
        else:
            # At Holm's strictest step, so that so many items are enough whatever the other
            # comparisons say.
            needed = items_needed(
                pair["only_source"],
                pair["only_engine"],
                pair["n"],
                margin,
                alpha / len(comparisons),
            )
        rows.append(
            {
                "engine": engine,
                "task": task,
                "strategy": strategy,
                "n": pair["n"],
                "verdict": verdict,
                "difference": pair["difference"]["value"],
                "interval": pair["difference"]["interval"],
                "lower": pair["noninferiority"]["lower"],
                "p": pair["noninferiority"]["p"],
                "p_holm": p,
                "p_inferior_holm": p_inferior,
                "items_needed": needed,
                "minimum_detectable": pair["minimum_detectable"],
            }
        )
    verdicts = [row["verdict"] for row in rows]
    return {
        "verdict": next((v for v in ("fail", "undecided") if v in verdicts), "pass"),
        "margin": margin,
        "alpha": alpha,
        "correction": f"Holm over {len(rows)} comparison{'s' if len(rows) > 1 else ''}",
        "comparisons": rows,
    }
