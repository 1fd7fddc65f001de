"""Where the canonical parts of a decoder lie in a GGUF file, and how their rows are read for it.

llama.cpp keeps q, k and v, or gate and up, as tensors of their own where a checkpoint does, and
some of its graphs rotate neighbouring elements of a head, so rows are cut out and, there,
interleaved. Sizes can be planned from the same table without reading a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
class TensorSource:
    """Where one tensor of the file comes from.

    part: the canonical part, '' for zeros. shape: of the tensor in the file. start, rows: which
    rows of the part it is. heads: how many heads' rows to interleave, 0 for none. stack: the parts
    (experts) whose rows it holds behind each other, () for a single part; `shape` then begins with
    their number.
    """

    part: str
    shape: tuple[int, ...]
    start: int = 0
    heads: int = 0
    stack: tuple[str, ...] = ()

    @property
    def rows(self) -> slice:
        count = self.shape[1] if self.stack else self.shape[0]
        return slice(self.start, self.start + count)

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part the tensor is read from."""
        return self.stack or (self.part,)


def own_graph(family: Architecture, d: DecoderConfig) -> bool:
    """Whether llama.cpp has no graph for this model, so that edgemed drives one of its own on
    llama.cpp's tensor library (ggml_session.py).

    The graph of a gguf_centred family divides the chosen gates by their sum, and knows no expert
    that every token uses.
    """
    if not family.gguf_arch:
        return True
    if d.experts is None:
        return False
    return not family.gguf_centred or not d.experts.renormalised or d.experts.shared


def graph_of(family: Architecture, d: DecoderConfig) -> tuple[str, bool]:
    """(llama.cpp's name of the graph that computes this decoder, whether it rotates elements 2i and
    2i+1 of a head).

    Some of its graphs take a head to be hidden / heads, and rotary frequencies to be plain powers.
    Another model is written for a graph that reads both, where its family names one.
    """
    unusual = d.q_size != d.hidden or rescaled(d) is not None
    if family.gguf_any_head and unusual:
        return family.gguf_any_head, True
    return family.gguf_arch, family.gguf_interleaved


def parts_with_biases(weights: CanonicalWeights) -> dict[str, ParamSpec]:
    """The parts of a checkpoint, with a bias where one is stored that is not all zeros (AutoGPTQ
    writes such), whatever is usual in its family.
    """
    checkpoint = weights.checkpoint
    parts = {}
    for name, part in weights.parts.items():
        biases = [f"{key}.bias" for key in weights.keys[name]]
        stored = part.bias or any(
            bias in checkpoint.tensors and bool(checkpoint.read(bias).any()) for bias in biases
        )
        parts[name] = replace(part, bias=stored)
    return parts


def file_layout(weights: CanonicalWeights) -> dict[str, TensorSource]:
    """`layout` of the file a checkpoint becomes."""
    return layout(weights.family, weights.decoder, parts_with_biases(weights))


def layout(
    family: Architecture, d: DecoderConfig, parts: Mapping[str, ParamSpec]
) -> dict[str, TensorSource]:
    """tensor -> where it comes from, in the file's order. A tied output matrix and a classification
    head are not in it.

    Experts of one layer are one tensor. Where the graph has experts in every layer (gguf_centred),
    a dense MLP is written as that many equal ones behind a router of zeros: whichever are chosen,
    renormalised gates give that MLP.
    """
    sources: dict[str, TensorSource] = {}
    centred = family.gguf_centred and not own_graph(family, d)
    for name, part in parts.items():
        if _is_stacked(name, centred):
            sources.update(_stacked(d, name, part))
        elif not _is_left_out(name, part, parts):
            sources.update(_single(family, d, name, part))
            if centred and name.rpartition(".")[2] in ("o", "lm_head") and not part.bias:
                # That graph asks for a bias here.
                weight = next(reversed(sources))
                bias = weight.removesuffix(".weight") + ".bias"
                sources[bias] = TensorSource("", part.shape[:1])
    return sources


def _is_stacked(name: str, centred: bool) -> bool:
    """Whether a part is one of several that one tensor holds: an expert's, or in a graph that has
    experts everywhere a dense MLP's.
    """
    dense_mlp = name.startswith("layers.") and name.endswith((".up", ".down"))
    return ".experts." in name or (centred and dense_mlp)


def _is_left_out(name: str, part: ParamSpec, parts: Mapping[str, ParamSpec]) -> bool:
    """Whether the text model's file does not hold a part: a head, the vision tower, or an output
    matrix tied to the embedding.
    """
    tied = name == "lm_head" and part.modules == parts["embed"].modules
    return tied or name == "head" or name.startswith("vision.")


def _single(
    family: Architecture, d: DecoderConfig, name: str, part: ParamSpec
) -> dict[str, TensorSource]:
    """The tensors of one part: one for each of its modules."""
    sources = {}
    prefix, _, last = name.rpartition(".")
    several = len(part.modules) > 1
    start = 0
    for number, tensor in enumerate(APART[last] if several else NAMES[last]):
        stem = _stem(prefix, tensor)
        shape = (part.rows[number], *part.shape[1:]) if several else part.shape
        heads = 0
        if graph_of(family, d)[1]:
            heads = {"attn_q": d.heads, "attn_k": d.kv_heads}.get(tensor, 0)
        sources[f"{stem}.weight"] = TensorSource(
            part=name,
            shape=shape,
            start=start,
            heads=heads,
        )
        if part.bias:
            sources[f"{stem}.bias"] = TensorSource(
                part=name,
                shape=shape[:1],
                start=start,
                heads=heads,
            )
        start += shape[0]
    return sources


def _stem(prefix: str, tensor: str) -> str:
    """llama.cpp's name without '.weight': blk.3.ffn_up of ('layers.3', 'ffn_up')."""
    if not prefix:
        return tensor
    block = prefix.replace("layers", "blk").removesuffix(".shared")
    suffix = "_shexp" if prefix.endswith(".shared") else ""
    return f"{block}.{tensor}{suffix}"


def _stacked(d: DecoderConfig, name: str, part: ParamSpec) -> dict[str, TensorSource]:
    """The tensors that begin with this expert, or with the dense MLP that stands for all of them;
    {} for the others.
    """
    _, layer, *_, last = name.split(".")
    if ".experts." in name and ".experts.0." not in name:
        return {}
    count = d.mixture.count
    stack = tuple(name.replace("experts.0.", f"experts.{j}.") for j in range(count))
    sources = {}
    if last == "up" and not d.sparse(int(layer)):
        # The router of a dense layer: zeros.
        sources[f"blk.{layer}.ffn_gate_inp.weight"] = TensorSource("", (count, d.hidden))
    several = len(part.modules) > 1
    names = APART["up"] if several else NAMES[last]
    row_counts = part.rows or part.shape[:1]
    start = 0
    for tensor, rows in zip(names, row_counts, strict=True):
        stem = f"blk.{layer}.{tensor}_exps"
        sources[f"{stem}.weight"] = TensorSource(
            part=name,
            shape=(count, rows, *part.shape[1:]),
            start=start,
            stack=stack,
        )
        if part.bias:
            sources[f"{stem}.bias"] = TensorSource(
                part=name,
                shape=(count, rows),
                start=start,
                stack=stack,
            )
        start += rows
    return sources


def layer_matrices(
    weights: CanonicalWeights, sources: Mapping[str, TensorSource]
) -> dict[str, TensorSource]:
    """Of the tensors of a file the weights of the layers' matrices: what GPTQ quantizes and a
    budget is shared out among.
    """
    matrices = {}
    for name, source in sources.items():
        if not source.part.startswith("layers.") or not name.endswith(".weight"):
            continue
        if weights.parts[source.part].kind == "matrix":
            matrices[name] = source
    return matrices


def rescaled(d: DecoderConfig) -> np.ndarray | None:
    """float32 [pairs]: what llama.cpp divides each rotary frequency by, where they are not the
    plain powers of theta; None where they are.
    """
    if d.positions != "rope":
        return None
    width = 2 * len(d.rope_frequencies)
    plain = np.array([d.rope_theta ** (-2 * i / width) for i in range(width // 2)])
    factors = plain / np.array(d.rope_frequencies)
    if np.abs(factors - 1).max() < 1e-6:
        return None
    return factors.astype(np.float32)


class Centred(CanonicalWeights):
    """Weights without the mean over the hidden axis in everything that is added to the residual
    stream (Family.gguf_centred): no score changes, for every norm that reads the stream takes its
    mean out anyway. Image features keep theirs: the session takes it out (Engine.centred).
    """

    def table(self, name: str) -> torch.Tensor:
        table = super().table(name)
        if name != "embed":
            return table
        return table - table.mean(1, keepdim=True)

    def matrix(self, name: str) -> Dense | Packed:
        matrix = super().matrix(name)
        # Only the outputs of these are added to the residual stream.
        if not name.startswith("layers.") or not name.endswith((".o", ".down")):
            return matrix
        weight = matrix.dense()
        bias = matrix.bias
        if bias is not None:
            bias = bias - bias.mean()
        return Dense(weight - weight.mean(0, keepdim=True), bias)


def preserved_bits(weights: CanonicalWeights, source: TensorSource) -> int:
    """4 or 8: in how many bits the packed integers of a tensor are preserved. Experts share one
    tensor, so the widest of them decides.
    """
    widths = [weights.packing(weights.keys[part][0])[0] for part in source.parts]
    return max(4, *widths)


class TensorReader:
    """Reads the tensors of a file in their order; a part is read once for all its tensors."""

    def __init__(self, weights: CanonicalWeights):
        self.weights = weights
        self.name = ""
        self.weight: torch.Tensor | Packed | None = None
        self.bias: torch.Tensor | None = None

    def read(self, source: TensorSource, bias: bool, bits: int) -> np.ndarray:
        """float32 weight or bias, or with bits (4 or 8) the bytes of a packed weight."""
        if not source.part:
            return np.zeros(source.shape, np.float32)
        if source.stack:
            shape = source.shape[1:]
            experts = [replace(source, shape=shape, stack=(), part=part) for part in source.stack]
            return np.stack([self.read(expert, bias, bits) for expert in experts])
        self._load(source.part, bool(bits))
        if bias:
            return self._bias(source)
        if isinstance(self.weight, Packed):
            rows = packed_rows(self.weight, source)
            return preserved_integers.preserved(rows, source.part, bits)
        if self.weight is None:
            raise RuntimeError(f"{source.part} was not read")
        return interleaved(self.weight.numpy(), source)

    def _bias(self, source: TensorSource) -> np.ndarray:
        # llama.cpp's graphs have a bias wherever the family stores one; a checkpoint may leave it
        # out where it is zero.
        if self.bias is None:
            return interleaved(np.zeros(source.rows.stop, np.float32), source)
        return interleaved(self.bias.numpy(), source)

    def _load(self, name: str, packed: bool) -> None:
        """Hold part `name`. packed: as its integers, not as the floats they stand for."""
        if name == self.name:
            return
        # Let go of the last one before the next is read, or two would be in memory.
        self.weight = None
        self.bias = None
        kind = self.weights.parts[name].kind
        if kind == "table":
            self.weight = self.weights.table(name)
        elif kind == "norm":
            self.weight, self.bias = self.weights.norm(name)
        else:
            matrix = self.weights.matrix(name)
            self.bias = matrix.bias
            if packed and isinstance(matrix, Packed):
                self.weight = matrix
            else:
                self.weight = matrix.dense()
        self.name = name


def packed_rows(matrix: Packed, source: TensorSource) -> Packed:
    """The rows of a packed matrix that a tensor of the file holds, without their bias."""
    return replace(
        matrix,
        q=interleaved(matrix.q, source),
        scales=interleaved(matrix.scales, source),
        zeros=interleaved(matrix.zeros, source),
        bias=None,
    )


def interleaved(rows: Any, source: TensorSource) -> Any:
    """The rows of a tensor's source, of an array or torch tensor [rows, ...].

    With heads, element i of a head's first half is followed by element i of its second half.
    """
    own_rows = rows[source.rows]
    if not source.heads:
        return own_rows
    half = own_rows.shape[0] // source.heads // 2
    # [heads, half of the head, element, ...]: swapping the two middle axes interleaves the halves.
    halves = own_rows.reshape(source.heads, 2, half, *own_rows.shape[1:])
    pairs = halves.swapaxes(1, 2)
    return pairs.reshape(own_rows.shape)
