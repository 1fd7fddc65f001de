"""What a recipe says about verification.

It stands beside the verb it belongs to, so that the verb needs no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VerifySpec:
    """prompts: card whose validation split is read. count windows of `width` tokens; greedy
    answers of `new` tokens after `prompt` tokens.

    max_kl: limit on the mean KL divergence (nats); min_top1: on top-1 agreement. carried: windows
    whose logits travel in the engine. Of vision models besides: images of the shipped card,
    answered with image_new greedy tokens each; 0: none.
    """

    prompts: str
    max_kl: float = 0.05
    min_top1: float = 0.9
    count: int = 20
    width: int = 96
    prompt: int = 32
    new: int = 64
    carried: int = 2
    images: int = 10
    image_new: int = 48
