"""Which precision each matrix gets so that the model loses least within a number of bytes: an exact
answer, not a greedy one.

Losses of matrices are taken to add up (they do to first order: each is a small KL divergence of its
own), so this is the multiple-choice knapsack problem, solved by dynamic programming over the sizes
that can occur.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgemed import units
from edgemed.errors import EdgemedError
from edgemed.formatting import size


@dataclass(frozen=True)
class Option:
    """One precision of one matrix. loss: what it adds to the KL divergence, nats per token; nbytes:
    what it takes.
    """

    name: str
    loss: float
    nbytes: int


def allocate(options: Mapping[str, list[Option]], budget: int) -> dict[str, Option]:
    """matrix -> its option: the smallest sum of losses whose bytes are at most `budget`.

    Raises EdgemedError where even the smallest options together are larger.
    """
    smallest = 0
    for choices in options.values():
        smallest += min(o.nbytes for o in choices)
    if smallest > budget:
        raise EdgemedError(
            f"the budget leaves {size(budget)} for the layers' matrices and their smallest"
            f" precisions take {size(smallest)}",
            "Give a larger budget",
        )
    # States no other state beats: (bytes, loss, choice, state before), both sorted, bytes rising
    # and losses falling.
    states: list[tuple] = [(0, 0.0, None, None)]
    left = smallest
    for choices in options.values():
        left -= min(o.nbytes for o in choices)
        grown = sorted(
            ((s[0] + o.nbytes, s[1] + o.loss, o, s) for s in states for o in choices),
            key=lambda state: state[:2],
        )
        states = []
        least = float("inf")
        for state in grown:
            # What follows needs at least `left` more.
            if state[1] < least and state[0] + left <= budget:
                states.append(state)
                least = state[1]
    chosen = []
    state = states[-1]
    while state[2] is not None:
        chosen.append(state[2])
        state = state[3]
    return dict(zip(options, reversed(chosen), strict=True))


def budget_bytes(text: str, matrices: int, fixed: int) -> int:
    """Bytes for the layers' matrices: '4.5bpw' gives each of their `matrices` weights so many bits,
    scales included; '1.6GB' is everything, `fixed` bytes of embeddings, heads and norms included.

    Raises EdgemedError where the text is neither.
    """
    bits = bits_per_weight(text)
    return int(bits * matrices / 8) if bits else units.size(text, "budget") - fixed


def bits_per_weight(text: str) -> float | None:
    """'4.5bpw' -> 4.5; None for a budget in bytes. Raises EdgemedError where no number above 0
    stands before 'bpw'.
    """
    if "bpw" not in text:
        return None
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*bpw\s*", text)
    if not match or not float(match[1]):
        raise EdgemedError(
            f"budget {text}: not a number of bits per weight",
            "For example: budget: 4.5bpw, or budget: 1.6GB",
        )
    return float(match[1])
