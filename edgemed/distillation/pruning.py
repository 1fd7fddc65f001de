"""Structured pruning: a smaller student made of chosen layers, the most important MLP neurons and
key/value heads, or whatever fits a number of parameters.

A student that begins as part of its teacher needs far less training than one that begins at random
(Sanh et al. 2019; Muralidharan et al. 2024). Only the sizes a config can say are changed, so the
result is an ordinary checkpoint of the same architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edgemed.artifacts import hashing, store
from edgemed.errors import EdgemedError
from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.checkpoint import Checkpoint, Writer, open_checkpoint
from edgemed.models.parameter_count import decoder_parameters
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.importance_matrix import importance

# Widths stay multiples of this, so that the groups of later quantization divide them.
STEP = 64
# The parts of a layer that can be pruned.
PARTS = ("attn_norm", "qkv", "o", "mlp_norm", "up", "down")
# The keys under which configs state a size. Most families read one of them only.
KEYS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "ffn": ("intermediate_size", "n_inner"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
}


@dataclass(frozen=True)
class StudentShape:
    """What a student keeps. layers: the source's layers, in order. ffn: neurons per MLP. kv_heads:
    key/value heads, each with the query heads that read it.
    """

    layers: tuple[int, ...]
    ffn: int
    kv_heads: int


class KeptUnits(NamedTuple):
    """What of one layer stays: indices of neurons and of key/value heads, rising int64."""

    neurons: torch.Tensor
    heads: torch.Tensor


class Selection(NamedTuple):
    """Which canonical rows and columns of one matrix stay (None: all), and the factor on its q
    rows.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    q_factor: float = 1.0


def whole_shape(d: DecoderConfig) -> StudentShape:
    """The shape that keeps everything."""
    return StudentShape(tuple(range(d.layers)), d.ffn, d.kv_heads)


def pruned_config(d: DecoderConfig, shape: StudentShape) -> DecoderConfig:
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


def choose_shape(
    weights: CanonicalWeights,
    layers: Sequence[int],
    ffn: int | None,
    heads: int | None,
    target: int | None,
) -> StudentShape:
    """The student's shape. layers: one number is a count, several are indices, none keeps all.
    heads: query heads to keep. target: parameters at most.

    Raises EdgemedError for sizes the source does not have, or a target nothing fits.
    """
    d = weights.unfolded
    if target is not None:
        if layers or ffn or heads:
            raise EdgemedError(
                "distill: target_params chooses depth and width itself",
                "Leave layers, ffn and heads out, or target_params",
            )
        return fit_parameters(weights.family, d, target)
    kept_layers = _chosen_layers(layers, d.layers)
    if ffn is not None and not 1 <= ffn <= d.ffn:
        raise EdgemedError(
            f"distill: ffn {ffn} is not between 1 and the model's {d.ffn}",
            "Give the neurons to keep in each MLP",
        )
    group = d.heads // d.kv_heads
    if heads is not None and (not 1 <= heads <= d.heads or heads % group):
        raise EdgemedError(
            f"distill: heads {heads} is not a multiple of {group} up to {d.heads}",
            "Each key/value head goes with all query heads that read it",
        )
    return StudentShape(kept_layers, ffn or d.ffn, (heads or d.heads) // group)


def _chosen_layers(layers: Sequence[int], available: int) -> tuple[int, ...]:
    several = len(layers) > 1
    low = 0 if several else 1
    high = available - 1 if several else available
    out_of_range = any(not low <= n <= high for n in layers)
    if out_of_range or list(layers) != sorted(set(layers)):
        raise EdgemedError(
            f"distill: layers {list(layers)} cannot be taken from {available} layers",
            f"Give a count from 1 to {available}, or rising indices from 0 to {available - 1}",
        )
    if not layers:
        return tuple(range(available))
    return tuple(layers) if several else evenly(layers[0], available)


def fit_parameters(family: Architecture, d: DecoderConfig, target: int) -> StudentShape:
    """The shape of at most `target` parameters.

    For each depth the widest MLP (a multiple of 64) that fits. Of those the one whose share of
    neurons is nearest to its share of layers, in doubt the deeper. Heads stay. Raises EdgemedError
    where one layer is too much already.
    """
    fitting = []
    for count in range(1, d.layers + 1):
        depth = evenly(count, d.layers)
        ffn = _widest_mlp(family, d, depth, target)
        if ffn >= 1:
            imbalance = abs(ffn / d.ffn - count / d.layers)
            fitting.append((imbalance, -count, StudentShape(depth, ffn, d.kv_heads)))
    if not fitting:
        smallest = StudentShape((0,), min(STEP, d.ffn), d.kv_heads)
        least = decoder_parameters(family, pruned_config(d, smallest))
        raise EdgemedError(
            f"distill: no student has {target:,} parameters: one layer with the embedding has"
            f" {least:,}",
            f"Ask for at least {least:,}",
        )
    return min(fitting, key=lambda entry: entry[:2])[2]


def _widest_mlp(family: Architecture, d: DecoderConfig, depth: tuple[int, ...], target: int) -> int:
    """Neurons of the widest MLP with which these layers have at most `target` parameters; 0 or
    less where there is none.
    """
    one, two = (
        decoder_parameters(family, pruned_config(d, StudentShape(depth, ffn, d.kv_heads)))
        for ffn in (1, 2)
    )
    # The count is linear in the width, so the difference is what one neuron costs.
    ffn = min(d.ffn, (target - one) // (two - one) + 1)
    return ffn if ffn == d.ffn else ffn // STEP * STEP


def pruned_hf_config(weights: CanonicalWeights, shape: StudentShape) -> dict[str, Any]:
    """The source's config.json with the student's sizes. Raises EdgemedError where the architecture
    cannot say them.
    """
    source = weights.unfolded
    config = {
        key: value for key, value in weights.checkpoint.config.items() if key != "torch_dtype"
    }
    wanted = pruned_config(source, shape)
    kinds = _text_part(config).get("layer_types")
    if isinstance(kinds, list):
        config = _with_text_key(config, "layer_types", [kinds[n] for n in shape.layers])
    for name in KEYS:
        if getattr(wanted, name) != getattr(source, name):
            for key in _size_keys(weights, name):
                config = _with_text_key(config, key, getattr(wanted, name))
    if not _reads_as(weights.family, config, wanted):
        reason = ""
        if shape.kv_heads != source.kv_heads:
            reason = ": its head size follows from its number of heads"
        raise EdgemedError(
            f"{weights.checkpoint.path}: the config of this architecture cannot say"
            f" {asdict(shape)}{reason}",
            "Prune layers and ffn only",
        )
    return {**config, "dtype": "float32"}


def _size_keys(weights: CanonicalWeights, name: str) -> list[str]:
    """The keys that state this size in the source's config. Where it takes a default, the key that
    its family reads; none where the family reads no such key.
    """
    config = weights.checkpoint.config
    text = _text_part(config)
    stated = [key for key in KEYS[name] if text.get(key) is not None]
    if stated:
        return stated
    source = weights.unfolded
    for key in KEYS[name]:
        # The size stays, so only a family that does not read this key refuses.
        if _reads_as(weights.family, _with_text_key(config, key, getattr(source, name)), source):
            return [key]
    return []


def _reads_as(family: Architecture, config: Mapping[str, Any], wanted: DecoderConfig) -> bool:
    """Whether a family reads a config, and reads these numbers from it. Attention scales may
    differ: they follow from the layers' numbers.
    """
    try:
        decoder = family.decoder(config, {})
    except EdgemedError:
        return False
    return replace(decoder, score_scale=wanted.score_scale) == wanted


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # Vision models may keep the text model's sizes in a mapping of their own.
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _with_text_key(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with a key of the text model. A size that stands both in the text model's mapping
    and beside it is changed in both.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return {**config, key: value}
    beside = {key: value} if config.get(key) is not None else {}
    return {**config, **beside, "text_config": {**text, key: value}}


def important_units(
    weights: CanonicalWeights, shape: StudentShape, sequences: Sequence[Sequence[int]]
) -> dict[int, KeptUnits]:
    """layer -> the neurons and key/value heads to keep.

    A neuron's importance is the expected size of what it adds to the residual stream, ||down[:,
    j]|| sqrt(E[a_j^2]) over the tokens of `sequences`. A head's is the root of the sum of squares
    of the same over its columns of `o`. All are kept where nothing is dropped, and then no text is
    read.
    """
    d = weights.unfolded
    if (shape.ffn, shape.kv_heads) == (d.ffn, d.kv_heads):
        everything = KeptUnits(torch.arange(d.ffn), torch.arange(d.kv_heads))
        return dict.fromkeys(shape.layers, everything)
    squares = importance(weights, sequences)
    units = {}
    for n in shape.layers:
        neurons = _column_importance(weights, squares, f"layers.{n}.down")
        # The columns of `o` that belong to one key/value head lie side by side.
        heads = _column_importance(weights, squares, f"layers.{n}.o").reshape(d.kv_heads, -1)
        units[n] = KeptUnits(_largest(neurons, shape.ffn), _largest(heads.sum(1), shape.kv_heads))
    return units


def _column_importance(
    weights: CanonicalWeights, squares: Mapping[str, Any], name: str
) -> torch.Tensor:
    """Expected square [in] of what each input adds to the outputs of a matrix. squares: E[a^2] of
    each matrix' inputs.
    """
    column_norms = weights.matrix(name).dense().square().sum(0)
    return column_norms * torch.from_numpy(squares[name])


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores, rising."""
    return scores.topk(count).indices.sort().values


def prune(
    weights: CanonicalWeights, shape: StudentShape, out: Path, sequences: Sequence[Sequence[int]]
) -> Checkpoint:
    """Write the student to `out` in float32 (reused where it is already there). sequences: tokens
    that importance is measured on.

    Raises EdgemedError where the source is quantized, or has parts that cannot be pruned.
    """
    reason = _why_not(weights, shape)
    if reason:
        raise EdgemedError(
            f"{weights.checkpoint.path} cannot be pruned: {reason}",
            "Give a student of your own, and this model as its teacher",
        )
    config = pruned_hf_config(weights, shape)
    student = weights.family.decoder(config, {})
    tokens = [list(map(int, sequence)) for sequence in sequences]
    inputs = {**weights.checkpoint.hashes(), "windows": hashing.digest(tokens)}
    with store.building(out, "checkpoint", "cut", asdict(shape), inputs) as work:
        if work is not None:
            units = important_units(weights, shape, tokens)
            writer = Writer(work.path, config, weights.checkpoint.path)
            _write(weights, shape, units, student, writer)
    return open_checkpoint(out)


def _why_not(weights: CanonicalWeights, shape: StudentShape) -> str:
    """Why this checkpoint cannot be pruned to this shape; '' where it can."""
    if weights.quantized:
        return "it is quantized"
    parts = {name.split(".", 2)[2] for name in weights.parts if name.startswith("layers.")}
    unknown = sorted(parts - set(PARTS))
    if unknown:
        return f"its layers have '{unknown[0]}'"
    same_width = (shape.ffn, shape.kv_heads) == (weights.unfolded.ffn, weights.unfolded.kv_heads)
    if weights.vision and not same_width:
        return "of a vision model, only layers can be left out"
    return ""


def _write(
    weights: CanonicalWeights,
    shape: StudentShape,
    units: Mapping[int, KeptUnits],
    student: DecoderConfig,
    writer: Writer,
) -> None:
    written: set[str] = set()
    for name in weights.parts:
        if not name.startswith("layers."):
            _copy(weights, name, writer, written, {}, Selection())
    for new, old in enumerate(shape.layers):
        # Where the scale of the scores depends on the layer's number, the moved layer's q rows take
        # up the difference.
        q_factor = weights.unfolded.score_scale[old] / student.score_scale[new]
        selections = _selections(weights.unfolded, units[old], q_factor)
        for name in weights.parts:
            if name.startswith(f"layers.{old}."):
                selection = selections.get(name.split(".")[-1], Selection())
                _copy(weights, name, writer, written, {old: new}, selection)
    writer.close()


def _selections(d: DecoderConfig, units: KeptUnits, q_factor: float) -> dict[str, Selection]:
    """What stays of each matrix of a layer. A key/value head's columns of `o` are those of all
    query heads that read it.
    """
    size = d.head_dim
    group_size = d.heads // d.kv_heads * size  # rows of q that read one key/value head
    q = (units.heads[:, None] * group_size + torch.arange(group_size)).flatten()
    kv = (units.heads[:, None] * size + torch.arange(size)).flatten()
    # 'qkv' has the rows of q, then of k, then of v.
    qkv = torch.cat([q, kv + d.q_size, kv + d.q_size + d.kv_size])
    # A gated MLP's 'up' has the gate's rows first.
    up = torch.cat([units.neurons, units.neurons + d.ffn]) if d.gated else units.neurons
    return {
        "qkv": Selection(rows=qkv, q_factor=q_factor),
        "up": Selection(rows=up),
        "o": Selection(columns=q),
        "down": Selection(columns=units.neurons),
    }


def _copy(
    weights: CanonicalWeights,
    name: str,
    writer: Writer,
    written: set[str],
    moved: Mapping[int, int],
    selection: Selection,
) -> None:
    """Write the modules of one part, each with the rows and columns that stay, under the student's
    layer number. Tied modules are written once.

    moved: the layer's number in the source -> in the student.
    """
    part = weights.parts[name]
    stop = 0
    for key, height in zip(weights.keys[name], part.rows or part.shape[:1], strict=True):
        start = stop
        stop = start + height
        student_key = key
        for old, new in moved.items():
            student_key = re.sub(rf"(?<=\.){old}(?=\.)", str(new), key, count=1)
        if student_key in written:
            continue
        written.add(student_key)
        for suffix in ("weight", "bias"):
            if f"{key}.{suffix}" in weights.checkpoint.tensors:
                tensor = weights.checkpoint.read(f"{key}.{suffix}").float()
                pruned = _selected(
                    tensor, part, suffix, selection, range(start, stop), weights.unfolded.q_size
                )
                writer.add(f"{student_key}.{suffix}", pruned)


def _selected(
    tensor: torch.Tensor,
    part: ParamSpec,
    suffix: str,
    selection: Selection,
    module_rows: range,
    q_size: int,
) -> torch.Tensor:
    """What stays of one stored tensor. module_rows: which canonical rows of the part it holds."""
    transposed = part.conv1d and suffix == "weight"
    if transposed:
        tensor = tensor.T
    start = module_rows.start
    if selection.q_factor != 1.0 and start < q_size:
        tensor = tensor.clone()
        tensor[: q_size - start] *= selection.q_factor
    if selection.rows is not None:
        inside = (selection.rows >= start) & (selection.rows < module_rows.stop)
        tensor = tensor[selection.rows[inside] - start]
    if selection.columns is not None and suffix == "weight":
        tensor = tensor[:, selection.columns]
    if transposed:
        tensor = tensor.T
    return tensor.contiguous()
