"""What a recipe says about verification.

It stands beside the verb it belongs to, so that the verb needs no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgemed.params import Doc, Range


@dataclass(frozen=True)
class VerifySpec:
    """How an engine is held against its float32 source, and what it must keep."""

    prompts: Annotated[str, Doc("Text card whose validation split is read.")]
    max_kl: Annotated[
        float, Range(0), Doc("Largest mean KL divergence from the source, in nats.")
    ] = 0.05
    min_top1: Annotated[
        float, Range(0, 1), Doc("Least share of positions with the same most likely token.")
    ] = 0.9
    count: Annotated[int, Range(1), Doc("Sequences that are read.")] = 20
    width: Annotated[int, Range(1), Doc("Tokens of a sequence.")] = 96
    prompt: Annotated[
        int, Range(1), Doc("Tokens of a sequence that a greedy answer continues.")
    ] = 32
    new: Annotated[int, Range(0), Doc("Tokens of a greedy answer.")] = 64
    carried: Annotated[int, Range(0), Doc("Sequences whose logits travel in the engine.")] = 2
    images: Annotated[
        int, Range(0), Doc("Images of the shipped card that a vision model is shown. 0: none.")
    ] = 10
    image_new: Annotated[int, Range(0), Doc("Greedy tokens of an answer about an image.")] = 48
