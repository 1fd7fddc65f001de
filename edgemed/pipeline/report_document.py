"""The run document: what a run found out, as the report reads it.

It also says what was not measured and why, so that a gap is never mistaken for a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgemed.artifacts import store
from edgemed.engines.engine import Engine
from edgemed.evaluation.evaluate import part_of
from edgemed.evaluation.task import questions
from edgemed.hardware.device import machine, read_device
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.parameter_count import parameters
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Recipe
from edgemed.reporting.verdicts import on_device

if TYPE_CHECKING:
    pass


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    weights = CanonicalWeights(checkpoint)
    return {
        "path": str(checkpoint.path),
        "family": weights.family.name,
        "parameters": parameters(weights),
        "files": checkpoint.hashes(),
        "random_weights": checkpoint.random_weights,
    }


def entry(
    engine: Engine,
    verified: dict[str, Any] | None,
    records: list[dict[str, Any]],
    evals: list[dict[str, Any]],
    gate: Mapping[str, Any] | None,
) -> dict[str, Any]:
    manifest = store.read_manifest(engine.path)
    return {
        "name": engine.name,
        "target": engine.target,
        "precision": engine.precision,
        "path": str(engine.path),
        "bytes": store.size_of(manifest),
        "manifest": manifest,
        "verify": verified,
        "records": records,
        "evals": evals,
        "gate": part_of(gate, engine.name),
        "stages": verified.get("stages", []) if verified else [],
    }


def not_measured(
    recipe: Recipe,
    engines: list[Engine],
    verified: list[dict[str, Any] | None],
    records: list[list[dict[str, Any]]],
) -> list[str]:
    """What a reader might take for granted and nobody measured."""
    device = asdict(read_device(recipe.device)) if recipe.device else None
    missing = (
        []
        if on_device(device, machine())
        else [
            f"Nothing was run on {recipe.device}: speeds and memory are those of the machine named"
            " below."
        ]
    )
    reasons = dict.fromkeys(found[0]["state"]["energy_reason"] for found in records if found)
    missing += (
        [f"Energy was not measured: {reason}." for reason in reasons if reason]
        if reasons
        else ["Energy was not measured."]
    )
    missing += [
        f"{e.name}: not measured at full clocks: {'; '.join(held)}."
        for e, found in zip(engines, records, strict=True)
        if found and (held := found[0]["state"]["throttling"])
    ]
    missing += [
        f"{e.name}: not benchmarked, because it failed verification."
        for e, v in zip(engines, verified, strict=True)
        if v and not v["passed"] and recipe.bench
    ]
    missing += [
        f"{e.name}: unbuilt ({e.target} has not compiled it), so neither speed nor accuracy was"
        f" measured; parity is that of {e.emulation}."
        for e in engines
        if e.emulation
    ]
    missing += [
        f"{e.name}: random weights, so accuracy and parity mean nothing and were not measured."
        for e in engines
        if e.random_weights
    ]
    missing += (
        []
        if recipe.verify
        else ["Engines were not verified against their source (no verify: in the recipe)."]
    )
    if recipe.verify and not recipe.verify.images and any(e.vision for e in engines):
        missing += ["Engines that see were not shown images in verification (images: 0)."]
    missing += (
        [] if recipe.bench else ["Speed and memory were not measured (no bench: in the recipe)."]
    )
    missing += [] if recipe.eval else ["Accuracy was not measured (no eval: in the recipe)."]
    if recipe.eval and recipe.eval.margin is None:
        missing += [
            "Whether an engine is not worse was not judged (no margin: in the recipe's eval)."
        ]
    stand_ins = (
        [spec for spec in recipe.eval.tasks if questions(spec, 1).synthetic] if recipe.eval else []
    )
    missing += [
        f"{spec}: asked on the shipped synthetic stand-in, which says nothing about accuracy; name"
        " a file of the real set."
        for spec in stand_ins
    ]
    if recipe.eval and recipe.eval.limit:
        missing += [f"Only the first {recipe.eval.limit} rows of each task were asked."]
    return missing
