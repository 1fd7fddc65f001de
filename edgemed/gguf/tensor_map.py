"""Where the canonical parts of a decoder lie in a GGUF file, and how their rows are read for it.

llama.cpp keeps q, k and v, or gate and up, as tensors of their own where a checkpoint does, and
some of its graphs rotate neighbouring elements of a head, so rows are cut out and, there,
interleaved. Sizes can be planned from the same table without reading a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemed.gguf import preserved_integers
from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.weights import CanonicalWeights, Dense, Packed

if TYPE_CHECKING:
    import torch

# canonical part -> llama.cpp's tensor; a part of several modules is that many tensors
NAMES = {
    "embed": ("token_embd",),
    "positions": ("position_embd",),
    "final_norm": ("output_norm",),
    "lm_head": ("output",),
    "attn_norm": ("attn_norm",),
    "qkv": ("attn_qkv",),
    "o": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "up": ("ffn_up",),
    "down": ("ffn_down",),
    "router": ("ffn_gate_inp",),
}
APART = {"qkv": ("attn_q", "attn_k", "attn_v"), "up": ("ffn_gate", "ffn_up")}
ROPE = "rope_freqs.weight"


@dataclass(frozen=True)
class Place:
    """One tensor of the file. part: the canonical part it comes from, '' for zeros; start, rows:
    which of its rows; heads: how many heads' rows to interleave, 0: none; stack: where it holds the
    same rows of several parts (experts) behind each other, those; shape then begins with their
    number.
    """

    part: str
    shape: tuple[int, ...]
    start: int = 0
    heads: int = 0
    stack: tuple[str, ...] = ()

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.shape[1 if self.stack else 0])


def own_graph(family: Architecture, d: DecoderConfig) -> bool:
    """Whether llama.cpp has no graph for this model, so that edgemed drives one of its own on
    llama.cpp's tensor library (ggml_session.py).

    The graph of a gguf_centred family divides the chosen gates by their sum, and knows no expert
    that every token uses.
    """
    return not family.gguf_arch or bool(
        d.experts and (not family.gguf_centred or not d.experts.renormalised or d.experts.shared)
    )


def layout(
    family: Architecture, d: DecoderConfig, parts: Mapping[str, ParamSpec]
) -> dict[str, Place]:
    """tensor -> where it comes from, in the file's order. A tied output matrix and a classification
    head are not in it.

    Experts of one layer are one tensor. Where the graph has experts in every layer (gguf_centred),
    a dense MLP is written as that many equal ones behind a router of zeros: whichever are chosen,
    renormalised gates give that MLP.
    """
    found: dict[str, Place] = {}
    centred = family.gguf_centred and not own_graph(family, d)
    for name, part in parts.items():
        if ".experts." in name or (
            centred and name.startswith("layers.") and name.endswith((".up", ".down"))
        ):
            found |= _stacked(d, name, part)
            continue
        if (
            name == "head"
            or name.startswith("vision.")
            or (name == "lm_head" and part.modules == parts["embed"].modules)
        ):
            continue
        prefix, _, last = name.rpartition(".")
        start = 0
        for number, tensor in enumerate(APART[last] if len(part.modules) > 1 else NAMES[last]):
            stem = tensor
            if prefix:
                block = prefix.replace("layers", "blk").removesuffix(".shared")
                stem = f"{block}.{tensor}{'_shexp' if prefix.endswith('.shared') else ''}"
            shape = (part.rows[number], *part.shape[1:]) if len(part.modules) > 1 else part.shape
            heads = (
                {"attn_q": d.heads, "attn_k": d.kv_heads}.get(tensor, 0)
                if family.gguf_interleaved
                else 0
            )
            found[f"{stem}.weight"] = Place(
                name,
                shape,
                start,
                heads,
            )
            if part.bias:
                found[f"{stem}.bias"] = Place(
                    name,
                    shape[:1],
                    start,
                    heads,
                )
            start += shape[0]
        if centred and last in ("o", "lm_head") and not part.bias:
            found[f"{stem}.bias"] = Place("", part.shape[:1])  # that graph asks for one
    return found


def _stacked(d: DecoderConfig, name: str, part: ParamSpec) -> dict[str, Place]:
    """The tensors that begin with this expert, or with the dense MLP that stands for all of them;
    {} for the others.
    """
    _, layer, *_, last = name.split(".")
    if ".experts." in name and ".experts.0." not in name:
        return {}
    stack = tuple(name.replace("experts.0.", f"experts.{j}.") for j in range(d.experts.count))
    found = {}
    start = 0
    if last == "up" and not d.sparse(int(layer)):
        found[f"blk.{layer}.ffn_gate_inp.weight"] = Place("", (d.experts.count, d.hidden))
    for tensor, rows in zip(
        APART["up"] if len(part.modules) > 1 else NAMES[last],
        part.rows or part.shape[:1],
        strict=True,
    ):
        found[f"blk.{layer}.{tensor}_exps.weight"] = Place(
            name,
            (len(stack), rows, *part.shape[1:]),
            start,
            stack=stack,
        )
        if part.bias:
            found[f"blk.{layer}.{tensor}_exps.bias"] = Place(
                name,
                (len(stack), rows),
                start,
                stack=stack,
            )
        start += rows
    return found


def rescaled(d: DecoderConfig) -> np.ndarray | None:
    """float32 [pairs]: what llama.cpp divides each rotary frequency by, where they are not the
    plain powers of theta; None where they are.
    """
    if d.positions != "rope":
        return None
    width = 2 * len(d.rope_frequencies)
    plain = np.array([d.rope_theta ** (-2 * i / width) for i in range(width // 2)])
    factors = plain / np.array(d.rope_frequencies)
    return None if np.abs(factors - 1).max() < 1e-6 else factors.astype(np.float32)


class Centred(CanonicalWeights):
    """Weights without the mean over the hidden axis in everything that is added to the residual
    stream (Family.gguf_centred): no score changes, for every norm that reads the stream takes its
    mean out anyway. Image features keep theirs: the session takes it out (Engine.centred).
    """

    def table(self, name: str) -> torch.Tensor:
        found = super().table(name)
        return found - found.mean(1, keepdim=True) if name == "embed" else found

    def matrix(self, name: str) -> Dense | Packed:
        found = super().matrix(name)
        if not name.startswith("layers.") or not name.endswith((".o", ".down")):
            return found
        weight = found.dense()
        bias = found.bias
        return Dense(
            weight - weight.mean(0, keepdim=True), None if bias is None else bias - bias.mean()
        )


def carried_bits(weights: CanonicalWeights, place: Place) -> int:
    """4 or 8: in how many bits a place's packed integers are carried. Experts share one tensor, so
    the widest of them decides.
    """
    return max(
        4, *(weights.packing(weights.keys[part][0])[0] for part in place.stack or (place.part,))
    )


class Reader:
    """Reads the tensors of a file in their order; a part is read once for all its tensors."""

    def __init__(self, weights: CanonicalWeights):
        self.weights = weights
        self.name = ""
        self.weight: torch.Tensor | Packed | None = None
        self.bias: torch.Tensor | None = None

    def read(self, place: Place, bias: bool, bits: int) -> np.ndarray:
        """float32 weight or bias, or with bits (4 or 8) the bytes of a packed weight."""
        if not place.part:
            return np.zeros(place.shape, np.float32)
        if place.stack:
            one = replace(place, shape=place.shape[1:], stack=())
            return np.stack(
                [self.read(replace(one, part=part), bias, bits) for part in place.stack]
            )
        if place.part != self.name:
            self.weight = self.bias = None  # before the next one is read, or two would be in memory
            self.weight, self.bias = self._part(place.part, bool(bits))
            self.name = place.part
        if bias:
            # llama.cpp's graphs have a bias wherever the family stores one; a checkpoint may leave
            # it out where it is zero.
            return interleaved(
                (
                    self.bias.numpy()
                    if self.bias is not None
                    else np.zeros(place.rows.stop, np.float32)
                ),
                place,
            )
        if bits:
            matrix = self.weight
            cut = type(matrix)(
                *(interleaved(getattr(matrix, f), place) for f in ("q", "scales", "zeros")),
                matrix.g_idx,
                matrix.bits,
                matrix.group,
                None,
            )
            return preserved_integers.carried(cut, place.part, bits)
        return interleaved(self.weight.numpy(), place)

    def _part(self, name: str, packed: bool) -> tuple[torch.Tensor | Packed, torch.Tensor | None]:
        kind = self.weights.parts[name].kind
        if kind == "table":
            return self.weights.table(name), None
        if kind == "norm":
            return self.weights.norm(name)
        matrix: Dense | Packed = self.weights.matrix(name)
        return (matrix if packed else matrix.dense()), matrix.bias


def interleaved(rows, place: Place):
    """The rows of a place, of an array or tensor [rows, ...]; with heads, element i of a head's
    first half is followed by element i of its second.
    """
    cut = rows[place.rows]
    if not place.heads:
        return cut
    halves = cut.reshape(place.heads, 2, cut.shape[0] // place.heads // 2, *cut.shape[1:])
    turned = halves.swapaxes(1, 2)
    return turned.reshape(cut.shape)
