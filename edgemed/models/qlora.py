"""How far an adapter that was trained on a quantized base is from itself once it is merged into
the base's float weights.

QLoRA's factors learn to make good what quantization did to their base as well. Merging them into
the float base is what runs everywhere, but it is another model than the trained one, so the
difference is measured and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgemed.models import bitsandbytes
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights, Dense, Packed

BATCH = 4  # samples whose scores are held at once


class Trained(CanonicalWeights):
    """A merged LoRA checkpoint as the model was in training: quantized W + B A in place of W + B A,
    for every matrix of its layers.
    """

    def __init__(self, merged: Checkpoint, base: CanonicalWeights, kind: str):
        """kind: 'nf4', 'nf4-double' (scales quantized as well) or 'int8'."""
        super().__init__(merged)
        self.base = base
        self.kind = kind

    def matrix(self, name: str) -> Dense | Packed:
        """A matrix as it was in training, float32 [out, in]."""
        merged = super().matrix(name)
        part = self.parts[name]
        if not name.startswith("layers.") or part.kind != "matrix":
            return merged
        source = self.base.matrix(name).dense()
        # By modules, as they lie in a checkpoint: blocks do not run on from one into the next.
        modules = source.split(list(part.rows or part.shape[:1]))
        quantized = torch.cat([self._quantized(name, rows) for rows in modules])
        return Dense(merged.dense() + (quantized - source), merged.bias)

    def _quantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What bitsandbytes leaves of a weight [out, in]."""
        if self.kind == "int8":
            return bitsandbytes.expand(bitsandbytes.int8(name, weight))
        return bitsandbytes.expand(bitsandbytes.nf4(weight, self.kind == "nf4-double"))


def difference(
    merged: Checkpoint, base: CanonicalWeights, kind: str, samples: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """KL(trained || merged) per position in nats, |merged - trained| / |trained| of all scores, and
    the share of positions with the same most likely token.

    samples: equally long sequences of tokens; of a head only the last token of each counts.
    """
    ours = CanonicalWeights(merged)
    trained = Trained(merged, base, kind)
    divergences = []
    agreements = []
    error = 0.0
    size = 0.0
    start = 0 if ours.decoder.head == "lm" else -1
    with torch.inference_mode():
        for rows in torch.tensor(samples).split(BATCH):
            scores = logits(ours, rows)[:, start:]
            expected = logits(trained, rows)[:, start:]
            p = expected.double().log_softmax(-1)
            q = scores.double().log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1).flatten())
            agreements.append((expected.argmax(-1) == scores.argmax(-1)).flatten())
            error += float((scores - expected).square().sum(dtype=torch.float64))
            size += float(expected.square().sum(dtype=torch.float64))
    kl = torch.cat(divergences)
    same = torch.cat(agreements)
    return {
        "base": kind,
        "positions": len(kl),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "relative_logit_difference": (error / size) ** 0.5,
        "top1": float(same.double().mean()),
    }
