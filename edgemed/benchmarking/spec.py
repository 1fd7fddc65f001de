"""What a recipe says about benchmarking.

It stands beside the verb it belongs to, so that the verb needs no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgemed.params import Doc, NonEmpty, Range


@dataclass(frozen=True)
class BenchSpec:
    """What is measured, and what counts as fast enough in the report."""

    prompt: Annotated[
        tuple[Annotated[int, Range(1, 10_000_000)], ...],
        NonEmpty(),
        Doc("Prompt lengths, in tokens."),
    ] = (32, 128)
    generate: Annotated[int, Range(1, 10_000_000), Doc("New tokens of a round.")] = 64
    runs: Annotated[int, Range(1, 10_000), Doc("Counted rounds, after one warm-up round.")] = 5
    threads: Annotated[
        int | None,
        Range(1, 512),
        Doc("CPU threads, four for each core at most. None: the physical cores."),
    ] = None
    image: Annotated[
        int | None,
        Range(0, 100_000),
        Doc("Side in pixels of the image that a vision model is asked about. 0: none."),
    ] = 448
    wait_quiet: Annotated[
        float | None,
        Range(0, 86_400),
        Doc("Seconds to wait at most for a machine that does nothing else. None: measure at once."),
    ] = None
    max_first_token: Annotated[
        float | None,
        Range(above=0),
        Doc("Most seconds to the first token, at the longest prompt. None: no target."),
    ] = None
    min_tokens_per_second: Annotated[
        float | None, Range(above=0), Doc("Least speed of decoding. None: no target.")
    ] = None
