"""Scores of the model and the tensors they were computed from: edgemed's decoder beside
transformers' own class, with the same layers.

A tensor that one of the two reads and the other does not is named before any score is looked at,
because it says more than a number that is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgemed.documents.witness import WitnessRow
from edgemed.models.architecture import DecoderConfig
from edgemed.models.weights import CanonicalWeights
from edgemed.verification.witness import native, reading, samples
from edgemed.verification.witness.native import Depth, NativeModel
from edgemed.verification.witness.reading import Probe, RecordedCheckpoint
from edgemed.verification.witness.tally import Tally
from edgemed.vision.preprocessing import patches

# Largest difference of a score, in parts of the range of the scores at its position: float32 in
# another order of operations stays a hundred times below.
TOLERANCE = 1e-3
LENGTH = 32  # tokens of a sequence
# Rotary angles of positions far beyond lose the digits of float32.
FARTHEST = 1023
# Positions whose scores are compared, in parts of a sequence.
PLACES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
# Layers of a pattern that are all computed.
LONGEST_PERIOD = 8
LAYER = re.compile(r"(vision\.(?:spare\.)?)?layers\.(\d+)\.")
# Parameters that only transformers loads and that are tried out, to see whether they do anything.
TRIED = 16


@dataclass(frozen=True)
class Computed:
    """Both sides of the scores. ours, theirs: float32 [tokens, width] of each probe; digests: of
    the tensors that edgemed read.
    """

    probes: tuple[Probe, ...]
    ours: tuple[np.ndarray, ...]
    theirs: tuple[np.ndarray, ...]
    digests: dict[str, str]
    model: NativeModel
    hidden: bool


def whole_depth(d: DecoderConfig, vision_layers: int) -> Depth:
    """Every layer."""
    return Depth(tuple(range(d.layers)), tuple(range(vision_layers)))


def reduced_depth(d: DecoderConfig, config: Any, vision_layers: int) -> Depth:
    """As many first layers as the pattern of layers has a period, or the first layer of each kind
    where it has none; and the last one.

    config: transformers' config object, whose kinds of layers count as well as edgemed's.
    """
    types = getattr(config.get_text_config(), "layer_types", None) or ()
    if len(types) != d.layers:
        types = ("",) * d.layers
    kinds = [(types[n], d.sparse(n)) for n in range(d.layers)]
    first = {kinds.index(kind) for kind in kinds}
    for period in range(1, min(LONGEST_PERIOD, d.layers) + 1):
        if all(kinds[n] == kinds[n % period] for n in range(d.layers)):
            first |= set(range(period))
            break
    vision = {0, vision_layers - 1} if vision_layers else set()
    return Depth(tuple(sorted({*first, d.layers - 1})), tuple(sorted(vision)))


def elements(weights: CanonicalWeights, depth: Depth) -> int:
    """Numbers that both sides hold at this depth: transformers' model, and of edgemed's the tables,
    the output matrix and the largest layer.
    """
    tables = 0
    layers: dict[tuple[str, int], int] = {}
    for name, part in weights.parts.items():
        size = math.prod(part.shape)
        layer = LAYER.match(name)
        if layer is None:
            tables += size
            continue
        number = int(layer[2])
        if number in (depth.vision if layer[1] else depth.text):
            layers[layer[1], number] = layers.get((layer[1], number), 0) + size
    return 2 * tables + sum(layers.values()) + max(layers.values(), default=0)


def probes_of(weights: CanonicalWeights, config: Any) -> tuple[Probe, ...]:
    """Tokens from position 0, tokens at positions far apart, and for a vision model an image among
    tokens.
    """
    d = weights.decoder
    text = config.get_text_config()
    unusable = {getattr(text, "pad_token_id", None), getattr(config, "pad_token_id", None)}
    for name in ("image_token_id", "video_token_id", "image_token_index"):
        unusable.add(getattr(config, name, None))
    vision = weights.vision
    if vision is not None:
        unusable |= {vision.token, *vision.before, *vision.after}
    ids = samples.token_sequence(
        d.vocab,
        min(LENGTH, d.context),
        frozenset(token for token in unusable if isinstance(token, int)),
    )
    farthest = min(d.context - 1, FARTHEST)
    probes = [
        Probe("text", tuple(ids)),
        Probe(
            "text at far positions",
            tuple(ids),
            tuple(samples.spread_positions(len(ids), farthest)),
        ),
    ]
    if vision is None:
        return tuple(probes)
    from PIL import Image

    image = patches(Image.fromarray(samples.picture(40, 60)), vision)
    around = ids[: max(2, len(ids) // 4)]
    tokens = [*around, *reading.image_tokens(weights, image), *around]
    if len(tokens) <= d.context:
        probes.append(Probe("an image", tuple(tokens), image=image))
    return tuple(probes)


def compute(
    weights: CanonicalWeights, checkpoint: RecordedCheckpoint, config: Any, depth: Depth
) -> Computed | None:
    """Both sides; None where transformers has no class. weights: of `checkpoint`.

    Raises one of native.REFUSALS where transformers does not take the checkpoint.
    """
    d = weights.decoder
    kind = native.native_class(config, weights.family, d.head)
    if kind is None:
        return None
    path = checkpoint.path
    model = native.load_native(path, kind, config, depth)
    hidden = False
    if d.head != "lm" and any(name.startswith("score") for name in model.missing):
        # A head of another name than transformers' own: what it reads is compared.
        base = native.base_class(config)
        model = native.load_native(path, base, config, depth)
        hidden = True
    probes = probes_of(weights, config)
    ours = reading.scores(weights, probes, depth, hidden)
    theirs = native_scores(model, probes, weights, hidden)
    return Computed(
        probes=probes,
        ours=tuple(ours),
        theirs=tuple(theirs),
        digests=dict(checkpoint.digests),
        model=model,
        hidden=hidden,
    )


def native_scores(
    model: NativeModel, probes: Sequence[Probe], weights: CanonicalWeights, hidden: bool
) -> list[np.ndarray]:
    """What transformers' model gives for each probe, float32 [tokens, width]; of a head that reads
    the last token, [1, width].
    """
    results = []
    with torch.inference_mode():
        for probe in probes:
            outputs = model.model(**inputs(probe, weights), use_cache=False)
            values = outputs.last_hidden_state if hidden else outputs.logits
            results.append(values.float().numpy().reshape(-1, values.shape[-1]))
    return results


def inputs(probe: Probe, weights: CanonicalWeights) -> dict[str, torch.Tensor]:
    """A probe as the arguments of transformers' models."""
    ids = torch.tensor([probe.tokens])
    # Without a mask, positions that are not consecutive would count as several sequences.
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if probe.positions is not None:
        arguments["position_ids"] = torch.tensor([probe.positions])
    image = probe.image
    if image is None:
        return arguments
    vision = weights.require_vision()
    pixels = torch.from_numpy(image.pixels)
    if vision.size:
        p = vision.patch
        cut = pixels.reshape(image.rows, image.columns, 3, p, p).permute(2, 0, 3, 1, 4)
        pixels = cut.reshape(1, 3, image.rows * p, image.columns * p)
    else:
        arguments["image_grid_thw"] = torch.tensor([[1, image.rows, image.columns]])
        arguments["mm_token_type_ids"] = (ids == vision.token).long()
    return {**arguments, "pixel_values": pixels}


def score_row(computed: Computed) -> WitnessRow:
    """Scores at a handful of positions of each probe."""
    tally = Tally("scores")
    if computed.hidden:
        tally.note = "what the head reads: its names are not transformers' own"
    for probe, ours, theirs in zip(computed.probes, computed.ours, computed.theirs, strict=True):
        compare_scores(tally, probe.what, ours, theirs)
    return tally.row()


def compare_scores(tally: Tally, what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Count the scores of one probe, a comparison per position."""
    if len(theirs) == 1:
        ours = ours[-1:]
    for place in sorted({round(part * (len(theirs) - 1)) for part in PLACES}):
        error = relative_error(ours[place], theirs[place])
        if error <= TOLERANCE:
            tally.same()
        else:
            tally.differs(
                f"{what}, token {place}: scores differ by {error:.2g} of their range"
                f" (at most {TOLERANCE:g})"
            )


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, in parts of the range of `theirs`; infinite where one is no number or
    the widths differ.
    """
    if ours.shape != theirs.shape or not np.isfinite(theirs).all() or not np.isfinite(ours).all():
        return math.inf
    span = float(theirs.max() - theirs.min()) or float(np.abs(theirs).max()) or 1.0
    return float(np.abs(ours - theirs).max()) / span


def agree(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    """Whether all scores agree at every position."""
    for mine, other in zip(ours, theirs, strict=True):
        rows = mine[-1:] if len(other) == 1 else mine
        if rows.shape != other.shape:
            return False
        if any(relative_error(a, b) > TOLERANCE for a, b in zip(rows, other, strict=True)):
            return False
    return True


def tensor_row(weights: CanonicalWeights, computed: Computed) -> WitnessRow:
    """Which tensors were read, by name and by their numbers: every parameter that transformers
    loaded, and every tensor that edgemed read at the same depth.
    """
    tally = Tally("weights")
    digests = computed.digests
    read_by_edgemed = set(digests.values())
    native_digests = {name: reading.digest(value) for name, value in computed.model.parameters()}
    buffers = computed.model.model.state_dict()
    native_values = set(native_digests.values())
    native_values |= {reading.digest(buffers[n]) for n in buffers if n not in native_digests}
    unread = [name for name, value in native_digests.items() if value not in read_by_edgemed]
    idle = without_effect(computed, unread[:TRIED], weights)
    for name in native_digests:
        if name not in unread or name in idle:
            tally.same()
        else:
            tally.differs(unread_sentence(weights, name, digests))
    for name, value in digests.items():
        if value in native_values or outside(weights, computed, name):
            tally.same()
        else:
            tally.differs(
                f"{file_of(weights, name)}: tensor '{name}' is read by edgemed and not by"
                f" {native.LIBRARY}"
            )
    for name in sorted(computed.model.missing - idle_missing(computed, weights)):
        tally.differs(f"{native.LIBRARY} has no tensor for '{name}' and fills it at random")
    return tally.row()


def unread_sentence(weights: CanonicalWeights, name: str, digests: dict[str, str]) -> str:
    """Why a parameter of transformers is not among the tensors that edgemed read."""
    stored = stored_name(weights, name)
    if stored in digests:
        return (
            f"{file_of(weights, stored)}: '{stored}' has other numbers in edgemed than in"
            f" {native.LIBRARY}: they read different files"
        )
    return (
        f"{file_of(weights, stored)}: tensor '{stored}' is read by {native.LIBRARY} and not by"
        " edgemed"
    )


def stored_name(weights: CanonicalWeights, name: str) -> str:
    """A parameter's name in the checkpoint: its own, or the one that ends alike."""
    tensors = weights.checkpoint.tensors
    if name in tensors:
        return name
    words = name.split(".")
    for start in range(1, len(words)):
        ending = ".".join(words[start:])
        for stored in tensors:
            if stored == ending or stored.endswith(f".{ending}"):
                return stored
    return name


def file_of(weights: CanonicalWeights, name: str) -> str:
    """The file a tensor lies in, for messages."""
    entry = weights.checkpoint.tensors.get(name)
    return entry.file.name if entry else str(weights.checkpoint.path)


def outside(weights: CanonicalWeights, computed: Computed, name: str) -> bool:
    """Whether a tensor that edgemed read is no part of what transformers computes here: the head
    where hidden states are compared, the vision encoder where only the text model has a class.
    """
    head = "lm_head" if weights.decoder.head == "lm" else "head"
    parts = [head] if computed.hidden else []
    if not any(probe.image is not None for probe in computed.probes):
        parts += [part for part in weights.parts if part.startswith("vision.")]
    modules = {key for part in parts for key in weights.keys[part]}
    return name in modules or name.rsplit(".", 1)[0] in modules


def without_effect(computed: Computed, names: Sequence[str], weights: CanonicalWeights) -> set[str]:
    """Which of these parameters change no score: a norm behind the layer that is read, say."""
    parameters = dict(computed.model.model.named_parameters())
    idle = set()
    for name in names:
        value = parameters[name].data
        original = value.clone()
        value.mul_(-3).add_(1)
        changed = native_scores(computed.model, computed.probes, weights, computed.hidden)
        value.copy_(original)
        if all(np.array_equal(a, b) for a, b in zip(changed, computed.theirs, strict=True)):
            idle.add(name)
    return idle


def idle_missing(computed: Computed, weights: CanonicalWeights) -> set[str]:
    """Names without a tensor that change nothing, or that share another parameter's numbers."""
    parameters = dict(computed.model.model.named_parameters())
    shared = {name for name in computed.model.missing if name not in parameters}
    present = [name for name in computed.model.missing if name in parameters][:TRIED]
    return shared | without_effect(computed, present, weights)
