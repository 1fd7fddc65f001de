"""What a recipe says about benchmarking.

It stands beside the verb it belongs to, so that the verb needs no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgemed.params import Doc, Range


@dataclass(frozen=True)
class BenchSpec:
    """What is measured, and what counts as fast enough in the report."""

    prompt: Annotated[tuple[Annotated[int, Range(1)], ...], Doc("Prompt lengths, in tokens.")] = (
        32,
        128,
    )
    generate: Annotated[int, Range(1), Doc("New tokens of a round.")] = 64
    runs: Annotated[int, Range(1), Doc("Counted rounds, after one warm-up round.")] = 5
    threads: Annotated[int | None, Range(1), Doc("CPU threads. None: the physical cores.")] = None
    image: Annotated[
        int | None,
        Range(0),
        Doc("Side in pixels of the image that a vision model is asked about. 0: none."),
    ] = 448
    max_first_token: Annotated[
        float | None,
        Range(above=0),
        Doc("Most seconds to the first token, at the longest prompt. None: no target."),
    ] = None
    min_tokens_per_second: Annotated[
        float | None, Range(above=0), Doc("Least speed of decoding. None: no target.")
    ] = None
