"""Where a scale of a matrix' inputs can be put so that the layer computes what it did: into the
norm or the matrix that makes these inputs. AWQ and SmoothQuant both fold their scales here.

The checkpoint stays a plain one that every runtime reads. Where the input comes out of a
nonlinearity alone there is nothing to fold a scale into, and nothing is scaled. Experts, shared
expert and router read one norm and share its scale; the router, which stays float32, is multiplied
by it too, so that it chooses as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from edgemed.models.architecture import DecoderConfig

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer


@dataclass(frozen=True)
class Fold:
    """One place where a scale can be put.

    source: the norm or matrix that makes the input. start: the first of the matrix' rows that do,
    None for a norm. fed: the matrices that read it, and the router; all tokens reach the first of
    them.
    """

    source: str
    fed: tuple[str, ...]
    start: int | None = None


def folds(d: DecoderConfig, n: int) -> list[Fold]:
    """Where decoder layer n takes scales."""
    ups = [f"{mlp}up" for mlp in d.mlps(n)]
    if d.sparse(n):
        ups.insert(0, "router")
    if d.parallel:
        places = [Fold("attn_norm", ("qkv", *ups))]
    else:
        places = [Fold("attn_norm", ("qkv",)), Fold("mlp_norm", tuple(ups))]
    places.append(Fold("qkv", ("o",), d.q_size + d.kv_size))
    if d.gated:
        # The rows of `up` behind the gate's are multiplied into what `down` reads.
        places += [Fold(f"{mlp}up", (f"{mlp}down",), d.ffn) for mlp in d.mlps(n)]
    return places


def shared_by_source(
    d: DecoderConfig, fold: Fold, magnitude: torch.Tensor, how: Literal["mean", "max"] = "mean"
) -> torch.Tensor:
    """Magnitudes [in] such that all inputs made by one row of the source have one value, the mean
    or the largest: heads that share a key head read the same v rows.
    """
    if fold.source != "qkv" or d.heads == d.kv_heads:
        return magnitude
    groups = magnitude.view(d.kv_heads, -1, d.head_dim)
    shared = groups.mean(1, keepdim=True) if how == "mean" else groups.amax(1, keepdim=True)
    return shared.expand(-1, d.heads // d.kv_heads, -1).reshape(-1)


def apply(d: DecoderConfig, fold: Fold, layer: Layer, scale: torch.Tensor) -> None:
    """Put a scale [in] into `layer`: the source is divided by it, the columns that read it are
    multiplied. The layer computes what it did.
    """
    weight, bias = layer[fold.source]
    if fold.start is None:
        layer[fold.source] = (weight / scale, None if bias is None else bias / scale)
    else:
        rows = torch.ones(weight.shape[0])
        if fold.source == "qkv":
            # A row of v makes the same input of every head that shares its key head.
            rows[fold.start :] = scale.view(d.kv_heads, -1, d.head_dim)[:, 0].reshape(-1)
        else:
            rows[fold.start :] = scale
        layer[fold.source] = (weight / rows[:, None], None if bias is None else bias / rows)
    for name in fold.fed:
        layer[name] = (layer[name][0] * scale, layer[name][1])
