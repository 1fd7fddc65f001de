"""What a recipe says about benchmarking.

It stands beside the verb it belongs to, so that the verb needs no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchSpec:
    """prompt: prompt lengths in tokens; generate: new tokens per round; runs: counted rounds after
    one warm-up round.

    image: side in pixels of the image that a vision model is asked about besides; 0: none.
    max_first_token (seconds, at the longest prompt) and min_tokens_per_second are what counts as
    fast enough in the report; None: no target.
    """

    prompt: tuple[int, ...] = (32, 128)
    generate: int = 64
    runs: int = 5
    threads: int | None = None
    image: int | None = 448
    max_first_token: float | None = None
    min_tokens_per_second: float | None = None
