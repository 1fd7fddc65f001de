"""Other ways to choose a token's experts than the reference's: with the authors' noise, and the
same choice counted.

Both are values that `torch_decoder.mlp` takes in place of its own rule, so that neither engines nor
the deterministic reference know of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig
from edgemed.models.torch_decoder import linear, routed

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer


class Noisy:
    """DeepSpeed's top2gating, with which the authors computed and evaluated top-2 models.

    The first expert is the one of the largest gate, the second that of the largest score + scale *
    Gumbel(0, 1) among the others; gates are the softmax of the scores without noise, divided by the
    sum of the two. scale 1 is theirs, 0 the deterministic rule. The noise is a function of the seed
    and of the order in which tokens are computed.
    """

    def __init__(self, d: DecoderConfig, seed: int, scale: float = 1.0):
        """Raises EdgemedError for a model that chooses another number of experts, which has no such
        noise, or a scale below 0.
        """
        if d.experts is None or d.experts.active != 2:
            has = "no experts" if d.experts is None else f"one that chooses {d.experts.active}"
            raise EdgemedError(
                f"the authors' noise is about the second of two experts, and this model has {has}",
                "Its choice has no noise; leave the option out",
            )
        if not 0 <= scale < float("inf"):
            raise EdgemedError(f"noise of scale {scale}", "Give 0 or more; the authors' is 1")
        self.scale = scale
        self.random = torch.Generator().manual_seed(seed)

    def __call__(
        self, n: int, d: DecoderConfig, layer: Layer, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gates, experts chosen), each [tokens, 2], for x float32 [tokens, hidden] of layer n."""
        scores = linear(layer, "router", x)
        # -log of an exponential variate is a Gumbel one.
        noise = -torch.empty_like(scores).exponential_(generator=self.random).log()
        first = scores.argmax(-1, keepdim=True)
        noisy = (scores + self.scale * noise).scatter(-1, first, float("-inf"))
        second = noisy.argmax(-1, keepdim=True)
        chosen = torch.cat([first, second], -1)
        gates = scores.softmax(-1).gather(-1, chosen)
        return gates / gates.sum(-1, keepdim=True), chosen


@dataclass
class ExpertUsage:
    """The deterministic choice, counted.

    group: what is computed now. tokens: group -> layer -> how many tokens chose each expert, int64
    [experts].
    """

    group: tuple[str, ...] = ()
    tokens: dict[tuple[str, ...], dict[int, torch.Tensor]] = field(default_factory=dict)

    def __call__(
        self, n: int, d: DecoderConfig, layer: Layer, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gates, experts chosen), each [tokens, active], for x float32 [tokens, hidden] of layer
        n.
        """
        gates, chosen = routed(d, layer, x)
        counts = torch.bincount(chosen.flatten(), minlength=d.mixture.count)
        layers = self.tokens.setdefault(self.group, {})
        layers[n] = layers[n] + counts if n in layers else counts
        return gates, chosen
