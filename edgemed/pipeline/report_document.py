"""The run document: what a run found out, as the report reads it.

It also says what was not measured and why, so that a gap is never mistaken for a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from edgemed.artifacts import store
from edgemed.documents.gate import GateVerdict
from edgemed.documents.machine import Machine, TargetDevice
from edgemed.documents.manifest import Manifest
from edgemed.documents.run import EngineEntry, Source
from edgemed.evaluation.evaluate import part_of
from edgemed.evaluation.task import questions
from edgemed.hardware.device import machine, read_device
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.parameter_count import parameters
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.engine_run import EngineRun
from edgemed.pipeline.recipe import Recipe
from edgemed.reporting.verdicts import on_device

Check = Callable[[Recipe, Sequence[EngineRun]], list[str]]


def describe(checkpoint: Checkpoint) -> Source:
    """The checkpoint a run begins with."""
    weights = CanonicalWeights(checkpoint)
    return Source(
        path=str(checkpoint.path),
        family=weights.family.name,
        parameters=parameters(weights),
        files=checkpoint.hashes(),
        random_weights=checkpoint.random_weights,
    )


def device_asked_for(recipe: Recipe) -> TargetDevice | None:
    """The device that the recipe names, None where it names none."""
    if recipe.device is None:
        return None
    return TargetDevice.from_json(asdict(read_device(recipe.device)))


def entry(run: EngineRun, gate: GateVerdict | None) -> EngineEntry:
    """What the run document says about one engine."""
    engine = run.engine
    manifest = store.read_manifest(engine.path)
    stages = run.verified.stages if run.verified else None
    return EngineEntry(
        name=engine.name,
        target=engine.target,
        precision=engine.precision,
        path=str(engine.path),
        bytes=store.size_of(manifest),
        manifest=Manifest.from_json(manifest),
        verify=run.verified,
        records=tuple(run.records),
        evals=tuple(run.evaluations),
        gate=part_of(gate, engine.name),
        stages=stages or (),
    )


def not_measured(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    """What a reader might take for granted and nobody measured, a sentence each."""
    return [sentence for check in CHECKS for sentence in check(recipe, runs)]


def other_machine(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    if on_device(device_asked_for(recipe), Machine.from_json(machine())):
        return []
    return [
        f"Nothing was run on {recipe.device}: speeds and memory are those of the machine named"
        " below."
    ]


def energy(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    states = [run.records[0].state for run in runs if run.records]
    if not states:
        return ["Energy was not measured."]
    reasons = dict.fromkeys(state.energy_reason for state in states if state)
    return [f"Energy was not measured: {reason}." for reason in reasons if reason]


def clocks(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    sentences = []
    for run in runs:
        state = run.records[0].state if run.records else None
        if state and state.throttling:
            reasons = "; ".join(state.throttling)
            sentences.append(f"{run.engine.name}: not measured at full clocks: {reasons}.")
    return sentences


def failed_verification(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    if not recipe.bench:
        return []
    return [
        f"{run.engine.name}: not benchmarked, because it failed verification."
        for run in runs
        if run.verified and not run.verified.passed
    ]


def unbuilt(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    return [
        f"{run.engine.name}: unbuilt ({run.engine.target} has not compiled it), so neither speed"
        f" nor accuracy was measured; parity is that of {run.engine.emulation}."
        for run in runs
        if run.engine.emulation
    ]


def random_weights(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    return [
        f"{run.engine.name}: random weights, so accuracy and parity mean nothing and were not"
        " measured."
        for run in runs
        if run.engine.random_weights
    ]


def parity(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    if not recipe.verify:
        return ["Engines were not verified against their source (no verify: in the recipe)."]
    if not recipe.verify.images and any(run.engine.vision for run in runs):
        return ["Vision models were not shown images in verification (images: 0)."]
    return []


def speed(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    if recipe.bench:
        return []
    return ["Speed and memory were not measured (no bench: in the recipe)."]


def accuracy(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    if not recipe.eval:
        return ["Accuracy was not measured (no eval: in the recipe)."]
    if recipe.eval.margin is None:
        return ["Whether an engine is not worse was not judged (no margin: in the recipe's eval)."]
    return []


def synthetic_tasks(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    tasks = recipe.eval.tasks if recipe.eval else ()
    return [
        f"{task}: asked on the shipped synthetic stand-in, which says nothing about accuracy; name"
        " a file of the real set."
        for task in tasks
        if questions(task, 1).synthetic
    ]


def limited_tasks(recipe: Recipe, runs: Sequence[EngineRun]) -> list[str]:
    if not recipe.eval or not recipe.eval.limit:
        return []
    return [f"Only the first {recipe.eval.limit} rows of each task were asked."]


# In the order in which the report lists them.
CHECKS: tuple[Check, ...] = (
    other_machine,
    energy,
    clocks,
    failed_verification,
    unbuilt,
    random_weights,
    parity,
    speed,
    accuracy,
    synthetic_tasks,
    limited_tasks,
)
