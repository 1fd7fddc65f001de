"""A smaller student made out of a checkpoint: chosen layers, the most important MLP neurons and
key/value heads, or whatever fits a number of parameters.

A student that begins as part of its teacher needs far less training than one that begins at random
(Sanh et al. 2019; Muralidharan et al. 2024). Only the sizes a config can say are changed, so what
comes out is an ordinary checkpoint of the same architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts import hashing, store
from edgemed.errors import EdgemedError, need
from edgemed.models.architecture import Architecture, DecoderConfig
from edgemed.models.checkpoint import Checkpoint, Writer, open_checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.importance_matrix import importance

if TYPE_CHECKING:
    import torch

# Widths stay multiples of this, so that the groups of later quantization divide them.
STEP = 64
PARTS = ("attn_norm", "qkv", "o", "mlp_norm", "up", "down")  # of a layer that can be cut
# Where configs in transformers' layout say a size: the first key that has the effect is changed.
KEYS = {
    "layers": ("n_layer", "num_hidden_layers"),
    "ffn": ("n_inner", "intermediate_size"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
}


@dataclass(frozen=True)
class Shape:
    """What a student keeps. layers: the source's layers, in order; ffn: neurons per MLP; kv_heads:
    key/value heads, each with the query heads that read it.
    """

    layers: tuple[int, ...]
    ffn: int
    kv_heads: int


def parameters(family: Architecture, d: DecoderConfig) -> int:
    """Weights and biases of a decoder as its family stores them, tied ones counted once."""
    found = {}
    for part in family.parts(d).values():
        for module, shape in part.stored():
            found[module] = math.prod(shape) + (shape[-1 if part.conv1d else 0] if part.bias else 0)
    return sum(found.values())


def smaller(d: DecoderConfig, shape: Shape) -> DecoderConfig:
    """The numbers of the student. Its attention scales are set when its config is read."""
    return replace(
        d,
        layers=len(shape.layers),
        score_scale=d.score_scale[: len(shape.layers)],
        ffn=shape.ffn,
        kv_heads=shape.kv_heads,
        heads=shape.kv_heads * (d.heads // d.kv_heads),
    )


def evenly(count: int, layers: int) -> tuple[int, ...]:
    """`count` of `layers` layers, evenly spaced, the first and (from two on) the last among
    them.
    """
    return tuple(round(i * (layers - 1) / max(count - 1, 1)) for i in range(count))


def choose(
    weights: CanonicalWeights,
    layers: Sequence[int],
    ffn: int | None,
    heads: int | None,
    target: int | None,
) -> Shape:
    """The shape asked for. layers: one number is a count, several are indices, none keeps all;
    heads: query heads to keep; target: parameters at most.

    Raises EdgemedError for sizes the source does not have, or a target nothing fits.
    """
    d = weights.unfolded
    every = Shape(tuple(range(d.layers)), d.ffn, d.kv_heads)
    if target is not None:
        if layers or ffn or heads:
            raise EdgemedError(
                "distill: target_params chooses depth and width itself",
                "Leave layers, ffn and heads out, or target_params",
            )
        return solve(weights.family, d, target)
    group = d.heads // d.kv_heads
    several = len(layers) > 1
    if any(not (0 <= n < d.layers if several else 1 <= n <= d.layers) for n in layers) or list(
        layers
    ) != sorted(set(layers)):
        raise EdgemedError(
            f"distill: layers {list(layers)} cannot be taken from {d.layers} layers",
            f"Give a count from 1 to {d.layers}, or rising indices from 0 to {d.layers - 1}",
        )
    layers = layers if several or not layers else evenly(layers[0], d.layers)
    if ffn is not None and not 1 <= ffn <= d.ffn:
        raise EdgemedError(
            f"distill: ffn {ffn} is not between 1 and the model's {d.ffn}",
            "Give the neurons to keep in each MLP",
        )
    if heads is not None and (not 1 <= heads <= d.heads or heads % group):
        raise EdgemedError(
            f"distill: heads {heads} is not a multiple of {group} up to {d.heads}",
            "Each key/value head goes with all query heads that read it",
        )
    return Shape(tuple(layers) or every.layers, ffn or d.ffn, (heads or d.heads) // group)


def solve(family: Architecture, d: DecoderConfig, target: int) -> Shape:
    """The shape of at most `target` parameters: for each depth the widest MLP (a multiple of 64)
    that fits, and of those the one whose share of neurons is nearest to its share of layers, in
    doubt the deeper. Heads are left alone.
    """
    fitting = []
    for count in range(1, d.layers + 1):
        depth = evenly(count, d.layers)

        def size(ffn: int, depth: tuple[int, ...] = depth) -> int:
            return parameters(family, smaller(d, Shape(depth, ffn, d.kv_heads)))

        per = size(2) - size(1)
        ffn = min(d.ffn, (target - size(1)) // per + 1)
        ffn = ffn if ffn == d.ffn else ffn // STEP * STEP
        if ffn >= 1:
            fitting.append(
                (abs(ffn / d.ffn - count / d.layers), -count, Shape(depth, ffn, d.kv_heads))
            )
    if not fitting:
        least = parameters(family, smaller(d, Shape((0,), min(STEP, d.ffn), d.kv_heads)))
        raise EdgemedError(
            f"distill: no student has {target:,} parameters: one layer with the embedding has"
            f" {least:,}",
            f"Ask for at least {least:,}",
        )
    return min(fitting, key=lambda entry: entry[:2])[2]


def config_of(weights: CanonicalWeights, shape: Shape) -> dict[str, Any]:
    """The source's config with the student's sizes. Raises EdgemedError where the architecture
    cannot say them.
    """
    source = weights.unfolded
    config = {
        key: value for key, value in weights.checkpoint.config.items() if key != "torch_dtype"
    }
    wanted = smaller(source, shape)
    kinds = config.get("text_config", config).get("layer_types")
    if isinstance(kinds, list):
        config = _with(config, "layer_types", [kinds[n] for n in shape.layers])
    for name in [name for name in KEYS if getattr(wanted, name) != getattr(source, name)]:
        trials = (_with(config, key, getattr(wanted, name)) for key in KEYS[name])
        config = next(
            (
                trial
                for trial in trials
                if getattr(weights.family.decoder(trial, {}), name) == getattr(wanted, name)
            ),
            config,
        )
    if replace(weights.family.decoder(config, {}), score_scale=wanted.score_scale) != wanted:
        tied = (
            ""
            if shape.kv_heads == source.kv_heads
            else ": its head size follows from its number of heads"
        )
        raise EdgemedError(
            f"{weights.checkpoint.path}: the config of this architecture cannot say"
            f" {asdict(shape)}{tied}",
            "Cut layers and ffn only",
        )
    return config | {"dtype": "float32"}


def _with(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    # Models that see may keep the text model's sizes in a mapping of their own.
    text = config.get("text_config")
    return (
        {**config, "text_config": {**text, key: value}}
        if isinstance(text, dict)
        else {**config, key: value}
    )


def kept(
    weights: CanonicalWeights, shape: Shape, windows: Sequence[Sequence[int]]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """layer -> (neurons, key/value heads) to keep, rising int64.

    A neuron's importance is the expected size of what it adds to the residual stream, ||down[:,
    j]|| sqrt(E[a_j^2]) over the tokens of `windows`; a head's is the root of the sum of squares of
    the same over its columns of `o`. All are kept where nothing is dropped, and then no text is
    read.
    """
    torch = need("torch", "build")
    d = weights.unfolded
    if (shape.ffn, shape.kv_heads) == (d.ffn, d.kv_heads):
        return {n: (torch.arange(d.ffn), torch.arange(d.kv_heads)) for n in shape.layers}
    squares = importance(weights, windows)
    found = {}
    for n in shape.layers:
        sizes = {
            name: (
                weights.matrix(f"layers.{n}.{name}").dense().square().sum(0)
                * torch.from_numpy(squares[f"layers.{n}.{name}"])
            )
            for name in ("down", "o")
        }
        heads = sizes["o"].reshape(d.kv_heads, -1).sum(1)
        found[n] = tuple(
            score.topk(count).indices.sort().values
            for score, count in ((sizes["down"], shape.ffn), (heads, shape.kv_heads))
        )
    return found


def cut(
    weights: CanonicalWeights, shape: Shape, out: Path, windows: Sequence[Sequence[int]]
) -> Checkpoint:
    """Write the student to `out` in float32 (reused where it is already there). windows: tokens
    that importance is measured on.

    Raises EdgemedError where the source is quantized, or has parts that cannot be cut.
    """
    strange = sorted(
        {name.split(".", 2)[2] for name in weights.parts if name.startswith("layers.")} - set(PARTS)
    )
    narrow = weights.vision and (shape.ffn, shape.kv_heads) != (
        weights.unfolded.ffn,
        weights.unfolded.kv_heads,
    )
    if weights.quantized or strange or narrow:
        reason = (
            "it is quantized"
            if weights.quantized
            else (
                f"its layers have '{strange[0]}'"
                if strange
                else "of a model that sees, only layers can be left out"
            )
        )
        raise EdgemedError(
            f"{weights.checkpoint.path} cannot be cut: {reason}",
            "Give a student of your own, and this model as its teacher",
        )
    config = config_of(weights, shape)
    student = weights.family.decoder(config, {})
    windows = [list(map(int, window)) for window in windows]
    inputs = weights.checkpoint.hashes() | {"windows": hashing.digest(windows)}
    with store.building(out, "checkpoint", "cut", asdict(shape), inputs) as work:
        if work is not None:
            _write(
                weights,
                shape,
                kept(weights, shape, windows),
                student,
                Writer(work.path, config, weights.checkpoint.path),
            )
    return open_checkpoint(out)


def _write(
    weights: CanonicalWeights,
    shape: Shape,
    keep: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    student: DecoderConfig,
    writer: Writer,
) -> None:
    written: set[str] = set()
    for name in weights.parts:
        if not name.startswith("layers."):
            _copy(weights, name, writer, written)
    for new, old in enumerate(shape.layers):
        # Where the scale of the scores depends on the layer's number, the moved layer's q rows take
        # up the difference.
        factor = weights.unfolded.score_scale[old] / student.score_scale[new]
        rows, columns = _selection(weights.unfolded, *keep[old])
        for name in [name for name in weights.parts if name.startswith(f"layers.{old}.")]:
            kind = name.split(".")[-1]
            _copy(
                weights,
                name,
                writer,
                written,
                (old, new),
                rows.get(kind),
                columns.get(kind),
                factor if kind == "qkv" else 1.0,
            )
    writer.close()


def _selection(
    d: DecoderConfig, neurons: torch.Tensor, heads: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    # Canonical rows and columns of each matrix that stay. A key/value head's columns of `o` are
    # those of all query heads that read it.
    torch = need("torch", "build")
    size = d.head_dim
    group = d.heads // d.kv_heads
    q = (heads[:, None] * group * size + torch.arange(group * size)).flatten()
    kv = (heads[:, None] * size + torch.arange(size)).flatten()
    up = torch.cat([neurons, neurons + d.ffn]) if d.gated else neurons
    return {"qkv": torch.cat([q, kv + d.q_size, kv + d.q_size + d.kv_size]), "up": up}, {
        "o": q,
        "down": neurons,
    }


def _copy(
    weights: CanonicalWeights,
    name: str,
    writer: Writer,
    written: set[str],
    layer: tuple[int, int] = (0, 0),
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    q_factor: float = 1.0,
) -> None:
    # The modules of one part, each with the rows of it that stay, under the student's layer number.
    # Tied modules are written once.
    part = weights.parts[name]
    start = 0
    read = weights.checkpoint.read
    tensors = weights.checkpoint.tensors
    old, new = layer
    for key, height in zip(weights.keys[name], part.rows or part.shape[:1], strict=True):
        begin = start
        start = start + height
        final = (
            re.sub(rf"(?<=\.){old}(?=\.)", str(new), key, count=1)
            if name.startswith("layers.")
            else key
        )
        if final in written:
            continue
        written.add(final)
        for suffix in ("weight", "bias"):
            if f"{key}.{suffix}" not in tensors:
                continue
            tensor = read(f"{key}.{suffix}").float()
            turned = part.conv1d and suffix == "weight"
            tensor = tensor.T if turned else tensor
            if q_factor != 1.0 and begin < weights.unfolded.q_size:
                tensor = tensor.clone()
                tensor[: weights.unfolded.q_size - begin] *= q_factor
            if rows is not None:
                tensor = tensor[rows[(rows >= begin) & (rows < start)] - begin]
            if columns is not None and suffix == "weight":
                tensor = tensor[:, columns]
            writer.add(f"{final}.{suffix}", (tensor.T if turned else tensor).contiguous())
