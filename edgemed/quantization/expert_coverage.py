"""Which calibration tokens an expert is quantized on. A token reaches only the experts it chooses,
so some experts see too few tokens to say anything about their inputs.

Such an expert is quantized by RTN and listed in the manifest, or is given the tokens whose gates
for it are largest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from edgemed.models.architecture import DecoderConfig
from edgemed.models.torch_decoder import linear, routed
from edgemed.quantization.settings import QuantizeSettings

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer

# expert -> for each calibration sample the tokens it is calibrated on
ExpertTokens = list[list[torch.Tensor]]


def expert_tokens(
    d: DecoderConfig, layer: Layer, reads: Iterable[torch.Tensor], settings: QuantizeSettings
) -> tuple[ExpertTokens, dict[str, list[int]]]:
    """(the tokens each expert is calibrated on, what the manifest says of it). reads: what the
    router reads, float32 [1, tokens, hidden] per sample.

    In the manifest, 'tokens': how many chose each expert; 'forced': how many were added to reach
    route_at_least; 'rounded': experts below expert_tokens all the same.
    """
    gates = []
    uses = []
    for read in reads:
        flat = read.reshape(-1, d.hidden)
        gate = linear(layer, "router", flat).softmax(-1)
        use = torch.zeros_like(gate, dtype=torch.bool)
        use.scatter_(1, routed(d, layer, flat)[1], True)
        gates.append(gate)
        uses.append(use)
    scores = torch.cat(gates)
    chosen = torch.cat(uses)
    tokens = chosen.sum(0).tolist()
    for expert, count in enumerate(tokens):
        missing = min(settings.route_at_least, len(chosen)) - count
        if missing > 0:
            # Among the tokens that did not choose it, those whose gates for it are largest.
            others = scores[:, expert].masked_fill(chosen[:, expert], -1)
            chosen[others.topk(missing).indices, expert] = True
    total = chosen.sum(0).tolist()
    coverage = {
        "tokens": tokens,
        "forced": [after - before for after, before in zip(total, tokens, strict=True)],
        "rounded": [e for e, count in enumerate(total) if count < settings.expert_tokens],
    }
    per_expert = []
    for column in chosen.T:
        samples = column.chunk(len(uses))
        per_expert.append([sample.nonzero(as_tuple=True)[0] for sample in samples])
    return per_expert, coverage


def rows_of(experts: ExpertTokens | None, name: str, sample: int) -> torch.Tensor | None:
    """The tokens of a sample that a matrix is calibrated on; None for all."""
    if experts is None or not name.startswith("experts."):
        return None
    return experts[int(name.split(".")[1])][sample]


def too_few_tokens(name: str, rows: int, settings: QuantizeSettings) -> bool:
    """Whether a matrix is an expert's that too few tokens reached to say anything about it: it is
    quantized by RTN.
    """
    return name.startswith("experts.") and rows < settings.expert_tokens
