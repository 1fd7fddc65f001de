"""How far an adapter that was trained on a rounded base is from itself once it is merged into the
base's float weights.

QLoRA's factors learn to make good what rounding did to their base as well. Merging them into the
float base is what runs everywhere, but it is another model than the trained one, so the difference
is measured and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgemed.errors import need
from edgemed.models import bitsandbytes
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights, Dense, Packed

if TYPE_CHECKING:
    import torch

BATCH = 4  # windows whose scores are held at once


class Trained(CanonicalWeights):
    """A merged LoRA checkpoint as the model was in training: round(W) + B A in place of W + B A,
    for every matrix of its layers.
    """

    def __init__(self, merged: Checkpoint, base: CanonicalWeights, kind: str):
        """kind: 'nf4', 'nf4-double' (scales rounded as well) or 'int8'."""
        super().__init__(merged)
        self.base = base
        self.kind = kind

    def matrix(self, name: str) -> Dense | Packed:
        found = super().matrix(name)
        part = self.parts[name]
        if not name.startswith("layers.") or part.kind != "matrix":
            return found
        source = self.base.matrix(name).dense()
        # By modules, as they lie in a checkpoint: blocks do not run on from one into the next.
        own = [self._rounded(name, rows) for rows in source.split(part.rows or part.shape[:1])]
        return Dense(found.dense() + (need("torch", "build").cat(own) - source), found.bias)

    def _rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return bitsandbytes.expand(
            bitsandbytes.int8(name, weight)
            if self.kind == "int8"
            else bitsandbytes.nf4(weight, self.kind == "nf4-double")
        )


def difference(
    merged: Checkpoint, base: CanonicalWeights, kind: str, windows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """KL(trained || merged) per position in nats, |merged - trained| / |trained| of all scores, and
    the share of positions with the same most likely token.

    windows: equally long token windows; of a head only the last token of each counts.
    """
    torch = need("torch", "build")
    ours = CanonicalWeights(merged)
    trained = Trained(merged, base, kind)
    kl = []
    same = []
    error = 0.0
    size = 0.0
    with torch.inference_mode():
        for rows in torch.tensor(windows).split(BATCH):
            found, right = (
                logits(weights, rows)[:, 0 if ours.decoder.head == "lm" else -1 :]
                for weights in (ours, trained)
            )
            p = right.double().log_softmax(-1)
            q = found.double().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).flatten())
            same.append((right.argmax(-1) == found.argmax(-1)).flatten())
            error = error + float((found - right).square().sum(dtype=torch.float64))
            size = size + float(right.square().sum(dtype=torch.float64))
    kl = torch.cat(kl)
    same = torch.cat(same)
    return {
        "base": kind,
        "positions": len(kl),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "relative_logit_difference": (error / size) ** 0.5,
        "top1": float(same.double().mean()),
    }
