"""Runs a recipe: steps in a line, engines in a fan, then verify, bench and eval, and one report of
it all.

Every artifact lies in a content-addressed store, so finished work is reused and an interrupted run
goes on where it stopped. Speeds are measured anew each time: a latency is never cached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed import params as strict
from edgemed import plugins
from edgemed.artifacts import hashing, store
from edgemed.console import say
from edgemed.data.text_sets import IMAGES, image_questions, read_card
from edgemed.engines.engine import Engine, export
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError, need
from edgemed.evaluation.evaluate import SOURCE, judge, pair, part_of, source_key
from edgemed.evaluation.opened_model import evaluate_opened, open_source, start_engine
from edgemed.evaluation.prompting import parse
from edgemed.evaluation.spec import EvalSpec
from edgemed.evaluation.task import Questions, questions
from edgemed.hardware.device import machine, read_device
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.random_weights import make_random
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Recipe, Stage
from edgemed.pipeline.references import adapted_references, reference_for, with_images
from edgemed.pipeline.report_document import describe, entry, not_measured
from edgemed.provenance import record
from edgemed.reporting.report import write
from edgemed.verification.parity import Limits, verify, with_adapters

if TYPE_CHECKING:
    pass

RANDOM = "random:"


@dataclass
class Line:
    """The checkpoints a recipe passes through, by step name; `source` is the last one before any
    rounding.
    """

    points: dict[str, Checkpoint]
    source: Checkpoint
    last: Checkpoint
    manifests: list[dict[str, Any]] = field(default_factory=list)


def run(recipe: Recipe, work: Path) -> Path:
    """Execute a recipe in `work` and return the path of report.html (report.json and report.md lie
    beside it).

    Raises EdgemedError for anything a person can put right; a second call goes on from the last
    finished step.
    """
    check_inputs(recipe)
    work = Path(work)
    cache = work / "store"
    line = run_steps(recipe, cache)
    reference = (
        reference_for(line.source, recipe.verify, cache)
        if recipe.verify and not line.source.random_weights
        else None
    )
    references = [
        with_images(reference, line.source, stage, recipe.verify, cache) if reference else None
        for stage in recipe.engines
    ]
    engines = [
        run_target(stage, line, own, recipe, cache, work)
        for stage, own in zip(recipe.engines, references, strict=True)
    ]
    verified = [
        verify_engine(engine, own, recipe, cache) if own else None
        for engine, own in zip(engines, references, strict=True)
    ]
    records = [
        (
            bench_engine(engine, recipe)
            if recipe.bench and not engine.emulation and (result is None or result["passed"])
            else []
        )
        for engine, result in zip(engines, verified, strict=True)
    ]
    source_evals, evals = run_evals(line.source, engines, recipe, cache)
    gate = run_gate(engines, evals, recipe)
    for engine, result, found in zip(engines, verified, evals, strict=True):
        source = record.known_source(recipe.model, line.points["model"].path, engine.path)
        record.document(
            engine.path,
            source,
            result,
            found,
            part_of(gate, engine.name),
            recipe.verify.prompts if result else None,
            IMAGES if result and result.get("stages") else None,
        )
    document = {
        "schema": 2,
        "title": recipe.title,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": dict(recipe.document),
        "device": asdict(read_device(recipe.device)) if recipe.device else None,
        "machine": machine(),
        "source": describe(line.points["model"]),
        "steps": line.manifests,
        "engines": [
            entry(*facts, gate) for facts in zip(engines, verified, records, evals, strict=True)
        ],
        "source_evals": source_evals,
        "strategies": list(recipe.eval.strategies) if recipe.eval else [],
        "gate": gate,
        "not_measured": not_measured(recipe, engines, verified, records),
    }
    store.write_json(work / "report.json", document)
    return write(document, work)


def check_inputs(recipe: Recipe) -> None:
    """Find a missing model, adapter, text set, importance or task file in the first second, not
    after an hour of work.
    """
    weights = (
        None if recipe.model.startswith(RANDOM) else CanonicalWeights(open_checkpoint(recipe.model))
    )
    for stage in recipe.steps:
        plugins.load("steps", stage.plugin).inputs(stage.params)
    for stage in recipe.engines:
        plugins.load("targets", stage.plugin).inputs(stage.params)
    need("cyclonedx", "bom")
    if recipe.verify:
        read_card(recipe.verify.prompts).digest("heldout")
        if weights and weights.vision:
            image_questions(recipe.verify.images)
    for spec in recipe.eval.tasks if recipe.eval else ():
        if questions(spec).has_vision and weights and not weights.vision:
            raise EdgemedError(
                f"task {spec} shows images, and {recipe.model} reads text only",
                "Leave the task out, or give a model that sees",
            )
    for text in recipe.eval.strategies if recipe.eval else ():
        parse(text)


def run_steps(recipe: Recipe, cache: Path) -> Line:
    model = open_model(recipe.model, cache)
    line = Line({"model": model}, model, model)
    for stage in recipe.steps:
        line.last = run_step(stage, line.last, cache)
        line.points[stage.plugin] = line.last
        line.manifests.append(store.read_manifest(line.last.path))
        if "quantization_config" not in line.last.config:
            line.source = line.last
    return line


def open_model(model: str, cache: Path) -> Checkpoint:
    """A checkpoint by directory or hub id; 'random:NAME' makes one of true dimensions with random
    weights under `cache`.
    """
    name = model.removeprefix(RANDOM)
    return (
        make_random(name, cache / f"random-{name}")
        if model.startswith(RANDOM)
        else open_checkpoint(model)
    )


def random_engine(name: str, target: str, values: Mapping[str, Any], work: Path) -> Path:
    """An engine of true dimensions with random weights, for latency and memory only."""
    module = plugins.load("targets", target)
    stage = Stage(target, strict.build(module.Params, values, target))
    checkpoint = open_model(f"random:{name}", work)
    out = work / f"{name}-{target}-{short(stage, module.inputs(stage.params))}"
    return export(checkpoint, target, stage.params, out, name=out.name).path


def run_step(
    stage: Stage, checkpoint: Checkpoint, cache: Path, out: Path | None = None
) -> Checkpoint:
    """One step into `out`, or into the store under its content key."""
    module = plugins.load("steps", stage.plugin)
    inputs = {
        f"checkpoint/{name}": sha for name, sha in checkpoint.hashes().items()
    } | module.inputs(stage.params)
    final = out or cache / f"{stage.plugin}-{short(stage, inputs)}"
    parent = (
        json.loads((checkpoint.path / store.MANIFEST).read_text())
        if (checkpoint.path / store.MANIFEST).is_file()
        else None
    )
    with store.building(
        final, "checkpoint", stage.plugin, asdict(stage.params), inputs, parent
    ) as work:
        say(f"{stage.plugin}: {'reused' if work is None else 'running'} [dim]{final}[/dim]")
        if work is not None:
            work.notes.update(module.run(checkpoint, work.path, stage.params))
    return open_checkpoint(final)


def short(stage: Stage, inputs: Mapping[str, str]) -> str:
    return hashing.digest(
        {"plugin": stage.plugin, "params": asdict(stage.params), "inputs": dict(inputs)}
    )[:12]


def run_target(
    stage: Stage, line: Line, reference: Reference | None, recipe: Recipe, cache: Path, work: Path
) -> Engine:
    checkpoint = line.points[stage.start] if stage.start else line.last
    carried = reference.trim(recipe.verify.carried) if reference else None
    inputs = checkpoint.hashes() | plugins.load("targets", stage.plugin).inputs(stage.params)
    adapted = adapted_references(line.source, stage, recipe.verify, cache) if reference else {}
    inputs |= {"reference": carried.digest() if carried else "none", "name": stage.name} | {
        f"reference/{name}": found.digest() for name, found in adapted.items()
    }
    final = cache / f"{stage.name}-{short(stage, inputs)}"
    say(f"{stage.plugin}: {stage.name} [dim]{final}[/dim]")
    engine = export(checkpoint, stage.plugin, stage.params, final, carried, stage.name, adapted)
    link = work / "engines" / stage.name
    link.parent.mkdir(exist_ok=True)
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(final, link.parent))
    os.replace(fresh, link)
    return engine


def verify_engine(
    engine: Engine, reference: Reference, recipe: Recipe, cache: Path
) -> dict[str, Any]:
    limits = Limits(recipe.verify.max_kl, recipe.verify.min_top1)
    inputs = {
        "engine": engine.key,
        "reference": reference.digest(),
        "ran_on": engine.emulation or engine.target,
    }
    result = cached(
        cache,
        "verify",
        {"limits": asdict(limits)},
        inputs,
        lambda: with_adapters(engine, verify(engine, reference, limits), limits),
    )
    say(
        f"verify: {engine.name} "
        + (
            "[green]passed[/green]"
            if result["passed"]
            else f"[red]failed[/red]: {'; '.join(result['problems'])}"
        )
    )
    return result


def cached(
    cache: Path, stage: str, params: Mapping[str, Any], inputs: Mapping[str, Any], compute: Any
) -> dict[str, Any]:
    """A deterministic result, computed once for its inputs."""
    final = cache / f"{stage}-{hashing.digest([params, inputs])[:12]}"
    with store.building(final, "result", stage, params, inputs) as work:
        if work is not None:
            store.write_json(work.path / "result.json", compute())
    return json.loads((final / "result.json").read_text(encoding="utf-8"))


def bench_engine(engine: Engine, recipe: Recipe) -> list[dict[str, Any]]:
    """Bench in a process of its own, so that peak memory is the engine's and not this build's."""
    spec = recipe.bench
    say(f"bench: {engine.name}")
    command = [
        sys.executable,
        "-m",
        "edgemed",
        "bench",
        str(engine.path),
        "--json",
        "--runs",
        str(spec.runs),
        "--generate",
        str(spec.generate),
    ]
    command += [part for length in spec.prompt for part in ("--prompt", str(length))]
    command += [
        "--image",
        str(spec.image or 0),
        *(["--threads", str(spec.threads)] if spec.threads else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EdgemedError(
            f"bench of {engine.name} failed: {said[-1]}",
            f"Run it alone: edgemed bench {engine.path}",
        )
    return json.loads(done.stdout)


def run_evals(
    source: Checkpoint, engines: list[Engine], recipe: Recipe, cache: Path
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Every task in every strategy on the source and on every engine, paired item by item."""
    source_results: list[dict[str, Any]] = []
    results: list[list[dict[str, Any]]] = [[] for _ in engines]
    if not recipe.eval or source.random_weights:
        return source_results, results
    spec = recipe.eval
    for task in spec.tasks:
        asked = questions(task, spec.limit)
        say(
            f"eval: {task} on the source and {len(engines)} engines, {len(asked.examples)} items,"
            f" {', '.join(spec.strategies)}"
        )
        for base in evals_of(None, source, asked, spec, cache):
            source_results.append(base)
        for engine, found in zip(engines, results, strict=True):
            if engine.emulation:
                continue
            manifest = store.read_manifest(engine.path)
            for base, result in zip(
                source_results[-len(spec.strategies) :],
                evals_of(engine, source, asked, spec, cache),
                strict=True,
            ):
                found.append(pair(result, base, manifest, spec.margin, spec.alpha))
    return source_results, results


def evals_of(
    engine: Engine | None, source: Checkpoint, asked: Questions, spec: EvalSpec, cache: Path
) -> list[dict[str, Any]]:
    """One result per strategy, of an engine or (None) of the source; what was computed before is
    taken from the cache.
    """
    found = []
    settings = spec.settings()
    opened = None

    def compute(text: str) -> dict[str, Any]:
        nonlocal opened  # opened at the first strategy that is not in the cache, and used for all
        opened = opened or (
            open_source(source, asked.has_vision)
            if engine is None
            else start_engine(engine, asked.has_vision)
        )
        return evaluate_opened(opened, asked, name, key, text, settings)

    key, name = (
        (source_key(source.hashes()), SOURCE) if engine is None else (engine.key, engine.name)
    )
    try:
        for text in spec.strategies:
            params = {"strategy": text, "settings": asdict(settings)}
            found.append(
                cached(
                    cache, "eval", params, {"model": key, "task": asked.key}, partial(compute, text)
                )
            )
    finally:
        if opened:
            opened.close()
    return found


def run_gate(
    engines: list[Engine], evals: list[list[dict[str, Any]]], recipe: Recipe
) -> dict[str, Any] | None:
    """The verdict over all engines, or None where the recipe names no margin."""
    if not recipe.eval or recipe.eval.margin is None:
        return None
    gate = judge(
        {engine.name: found for engine, found in zip(engines, evals, strict=True)},
        recipe.eval.margin,
        recipe.eval.alpha,
    )
    colours = {"pass": "green", "undecided": "yellow", "fail": "red"}
    for engine in engines:
        if part := part_of(gate, engine.name):
            say(f"gate: {engine.name} [{colours[part['verdict']]}]{part['verdict']}[/]")
    return gate
