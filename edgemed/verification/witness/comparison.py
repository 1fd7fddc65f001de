"""One checkpoint held against transformers: all rows, in the order in which a cause is sought.

Weights come first and scores last, because a tensor that was not read explains scores that differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from edgemed.documents.witness import WitnessResult, WitnessRow
from edgemed.formatting import size
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.hf_offline import quiet_and_offline
from edgemed.models.weights import CanonicalWeights
from edgemed.verification.witness import cause, images, native, reading, scores, texts
from edgemed.verification.witness.adapters import adapter_row
from edgemed.verification.witness.native import Depth
from edgemed.verification.witness.tally import Tally

# Memory that the witness may take where nobody says how much.
MEMORY = 4 << 30


def usual_memory() -> int:
    """Bytes that the witness may take: MEMORY, or half of what is free."""
    return min(MEMORY, psutil.virtual_memory().available // 2)


def compare(
    checkpoint: Checkpoint, memory: int, adapters: Mapping[str, str] | None = None
) -> WitnessResult:
    """Hold edgemed's reading of a checkpoint against transformers'.

    memory: bytes that both models may take together; scores are computed with all layers, with few,
    or not at all. adapters: name -> PEFT directory of switchable ones. Raises EdgemedError where
    edgemed itself does not read the checkpoint or an adapter.
    """
    source = reading.recorded(checkpoint)
    weights = CanonicalWeights(source)
    with quiet_and_offline(), tempfile.TemporaryDirectory(prefix="edgemed-witness-") as name:
        folder = Path(name)
        config, refusal = read_native_config(checkpoint, weights)
        rows, depth = model_rows(weights, source, config, refusal, memory, adapters or {})
        rows += texts.text_rows(weights, folder)
        whole = config if checkpoint.config.get("model_type") == model_type(config) else None
        rows.append(texts.stop_row(weights, config))
        exceptions: tuple[str, ...] = ()
        if weights.vision is not None:
            rows.append(images.image_row(weights, whole, folder))
            exceptions = tuple(f"{case}: {reason}" for case, reason in images.EXCEPTIONS)
    return WitnessResult(
        library=native.LIBRARY,
        version=native.VERSION,
        layers=depth.text,
        depth=weights.decoder.layers,
        rows=tuple(rows),
        exceptions=exceptions,
    )


def model_type(config: Any) -> str | None:
    """What a config object of transformers calls its architecture, None for None."""
    return None if config is None else str(config.model_type)


def read_native_config(checkpoint: Checkpoint, weights: CanonicalWeights) -> tuple[Any, str]:
    """(transformers' config object, None where it has no class or refuses; its reason)."""
    try:
        return native.native_config(checkpoint.path, checkpoint.config, weights.family), ""
    except native.REFUSALS as error:
        return None, texts.first_line(error)


def model_rows(
    weights: CanonicalWeights,
    source: reading.RecordedCheckpoint,
    config: Any,
    refusal: str,
    memory: int,
    adapters: Mapping[str, str],
) -> tuple[list[WitnessRow], Depth]:
    """The rows about tensors, scores and adapters, and the layers that were computed."""
    if refusal:
        return [refused("config.json", refusal)], Depth(())
    reason = why_not_computed(weights, config)
    depth, needed = affordable_depth(weights, config, memory)
    if not reason and depth is None:
        reason = f"two layers take {size(needed)}, and {size(memory)} are allowed (--memory)"
    if reason or depth is None:
        return without_scores(reason, adapters), Depth(())
    try:
        computed = scores.compute(weights, source, config, depth)
    except native.REFUSALS as error:
        return [refused("checkpoint", texts.first_line(error))], Depth(())
    if computed is None:
        reason = no_class(weights.family.vectors)
        return without_scores(reason, adapters), Depth(())
    tensor_row = scores.tensor_row(weights, computed)
    score_row = scores.score_row(computed)
    if score_row.differ and not tensor_row.differ:
        key = cause.score_cause(weights, computed, depth)
        if key:
            score_row = replace(score_row, first=f"{key} ({score_row.first})")
    rows = [tensor_row, score_row]
    for name, path in adapters.items():
        rows.append(adapter_row(weights, computed, depth, name, path))
    return rows, depth


def without_scores(reason: str, adapters: Mapping[str, str]) -> list[WitnessRow]:
    """The rows about tensors, scores and adapters where none can be compared."""
    names = ("weights", "scores", *(f"adapter {name}" for name in adapters))
    return [not_compared(name, reason) for name in names]


def why_not_computed(weights: CanonicalWeights, config: Any) -> str:
    """Why no scores can be compared, '' where they can."""
    if config is None:
        return no_class(weights.family.vectors)
    method = native.needs_packages(weights.checkpoint.config)
    if method:
        return (
            f"{native.LIBRARY} reads a {method} checkpoint only with packages that edgemed does"
            " not need"
        )
    return ""


def no_class(vectors: str) -> str:
    """What is said of an architecture that transformers does not have. vectors: Architecture's."""
    reason = f"{native.LIBRARY} has no class for this model"
    return f"{reason}; {vectors}" if vectors else reason


def affordable_depth(
    weights: CanonicalWeights, config: Any, memory: int
) -> tuple[Depth | None, int]:
    """(the most layers that fit into `memory` bytes, None where not even two do; the bytes they
    take).
    """
    if config is None:
        return None, 0
    d = weights.decoder
    vision_layers = weights.vision.layers if weights.vision is not None else 0
    needed = 0
    for depth in (
        scores.whole_depth(d, vision_layers),
        scores.reduced_depth(d, config, vision_layers),
    ):
        needed = 4 * scores.elements(weights, depth)
        if needed <= memory:
            return depth, needed
    return None, needed


def refused(what: str, reason: str) -> WitnessRow:
    """The row of what transformers refuses and edgemed reads."""
    tally = Tally("weights")
    tally.differs(f"{native.LIBRARY} refuses this {what}: {reason}")
    return tally.row()


def not_compared(what: str, reason: str) -> WitnessRow:
    """The row of what could not be compared."""
    return WitnessRow(what=what, comparisons=0, differ=0, note=reason)
