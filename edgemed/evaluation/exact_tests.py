"""One-sided tests for a paired difference of proportions, with a size that is proven and not
approximated.

Tango's score test alone passes a bad engine too often where few answers change (6.9 % instead of 5
% was found, and 9.6 % for wrongly failing a good one); here its statistic only orders the outcomes,
and p is the exact probability of the more extreme ones at the worst plausible truth.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# probability given to the share of changed answers lying outside its confidence set (Berger and
# Boos)
GAMMA = 1e-6
# pieces of that set; with more of them p would be smaller, by at most about 0.001 near 0.05
CELLS = 500


def null_variance(only_source: Any, only_engine: Any, n: int, loss: float) -> np.ndarray:
    """Variance of only_source - only_engine under H0: P(only source right) - P(only engine right) =
    loss, at the likeliest such truth.
    """
    b = np.asarray(only_source, float)
    c = np.asarray(only_engine, float)
    linear = (2 * n - b + c) * loss - b - c
    gained = (np.sqrt(np.maximum(linear**2 + 8 * n * c * loss * (1 - loss), 0)) - linear) / (4 * n)
    return n * (2 * gained + loss * (1 - loss))


def score(only_source: Any, only_engine: Any, n: int, loss: float) -> np.ndarray:
    """Tango's z (Statist. Med. 17:891, 1998) for that H0: large where the true loss is smaller.
    Counts of any broadcastable shape; -1 <= loss <= 1.

    Where the variance is 0, z is 0 or infinite.
    """
    distance = n * loss - np.asarray(only_source, float) + np.asarray(only_engine, float)
    variance = null_variance(only_source, only_engine, n, loss)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            variance > 1e-9,
            distance / np.sqrt(variance),
            np.where(np.abs(distance) < 1e-9, 0, np.copysign(np.inf, distance)),
        )


def plausible(k: int, n: int) -> tuple[float, float]:
    """Every p under which k of n has no probability below GAMMA by Chernoff's bound: n KL(k/n || p)
    <= log(2 / GAMMA).
    """
    share = k / n
    bound = math.log(2 / GAMMA) / n

    def far(p: float) -> bool:
        apart = (share * math.log(share / p) if k else 0) + (
            (1 - share) * math.log((1 - share) / (1 - p)) if k < n else 0
        )
        return apart > bound

    ends = []
    for outside in (0.0, 1.0):
        inside = share
        for _ in range(60):
            middle = (inside + outside) / 2
            if far(middle):
                outside = middle
            else:
                inside = middle
        ends.append(outside)
    return ends[0], ends[1]


def p_loss_at_least(only_source: int, only_engine: int, n: int, loss: float) -> float:
    """p value of H0: the engine loses at least `loss` (a share, negative for a gain) of n items
    against its source.

    The region 'score at least as large as observed' grows with fewer only_source and with more
    only_engine, so its probability under H0 is largest where the loss is exactly `loss`; what is
    left unknown there is the share of changed answers. p is an upper bound on the largest
    probability over its confidence set, plus GAMMA (Berger and Boos, JASA 89:1012, 1994): P(p <=
    alpha) <= alpha for every n and every truth, up to rounding. The largest size found by
    enumeration for n = 10 to 2000: 4.98 % at alpha 5 % (docs/measuring.md).
    """
    changed = only_source + only_engine
    low, high = (max(end, abs(loss)) for end in plausible(changed, n))
    edges = np.linspace(math.sqrt(low), math.sqrt(high), CELLS + 1) ** 2
    # Within a cell, no truth gives the region more probability than the smallest only_source with
    # the largest only_engine.
    bounds = region(
        only_source, only_engine, n, loss, (edges[:-1] + loss) / 2, (edges[1:] - loss) / 2
    )
    return min(1.0, float(bounds.max()) + GAMMA)


def region(
    only_source: int,
    only_engine: int,
    n: int,
    loss: float,
    p_source: np.ndarray,
    p_engine: np.ndarray,
) -> np.ndarray:
    """Probability [points] of a score at least as large as observed, for each point (P(only source
    right), P(only engine right)).

    The number of changed answers m is binomial, and given m those only the source got right are;
    the region is 'at most k(m) of m'. From one m to the next k grows by 0 or 1, so the inner
    binomial is summed along m by one term each.
    """
    changed = np.clip(p_source + p_engine, 0, 1)
    share = p_source / np.maximum(changed, 1e-300)
    spread = 9 * math.sqrt(n * changed.max() * (1 - changed.min())) + 20
    first = max(0, int(n * changed.min() - spread))
    last = min(n, int(n * changed.max() + spread))
    m = np.arange(first, last + 1)
    most = most_in_region(m, n, loss, float(score(only_source, only_engine, n, loss)))
    logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])

    def binomial(k: np.ndarray, total: np.ndarray | int, p: np.ndarray) -> np.ndarray:
        inside = (k >= 0) & (k <= total)
        k = np.where(inside, k, 0)
        terms = (
            logs[total]
            - logs[k]
            - logs[total - k]
            + k * np.log(np.maximum(p, 1e-300))[:, None]
            + (total - k) * np.log(np.maximum(1 - p, 1e-300))[:, None]
        )
        return np.where(inside, np.exp(terms), 0)

    start = binomial(np.arange(0, most[0] + 1), first, share).sum(1, keepdims=True)
    grows = most[1:] > most[:-1]
    # P(X(m+1) <= k) = P(X(m) <= k) - p P(X(m) = k);  P(X(m+1) <= k+1) = P(X(m) <= k) + (1 - p)
    # P(X(m) = k+1).
    change = binomial(most[1:], m[:-1], share) * np.where(
        grows, 1 - share[:, None], -share[:, None]
    )
    inner = np.concatenate([start, start + np.cumsum(change, 1)], 1)
    outer = binomial(m, n, changed)
    # What the window leaves out counts as inside the region.
    return (outer * inner).sum(1) + np.maximum(0, 1 - outer.sum(1))


def most_in_region(m: np.ndarray, n: int, loss: float, observed: float) -> np.ndarray:
    """The largest number of only_source, for each number of changed answers m, whose score is at
    least `observed`; -1 where none is.
    """
    low = np.full(len(m), -1)
    high = m.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        inside = score(middle, m - middle, n, loss) >= observed - 1e-9
        low = np.where(inside, middle, low)
        high = np.where(inside, high, middle - 1)
    return low


def lower_limit(only_source: int, only_engine: int, n: int, alpha: float, first: float) -> float:
    """Lower confidence limit of the difference engine - source, one-sided at 1 - alpha: what
    p_loss_at_least rejects lies below it.

    Found by bisection to 1e-5, rounded outwards; `first` is tried first, so the limit always agrees
    with the test at that difference.
    """
    low = -1.0
    high = (only_engine - only_source) / n
    middle = first
    while high - low > 1e-5:
        if p_loss_at_least(only_source, only_engine, n, -middle) <= alpha:
            low = middle
        else:
            high = middle
        middle = (low + high) / 2
    return low
