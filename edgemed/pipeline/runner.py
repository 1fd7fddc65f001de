"""Runs a recipe: steps in a line, engines in a fan, then verify, bench and eval, and one report of
it all.

Every artifact lies in a content-addressed store, so finished work is reused and an interrupted run
goes on where it stopped. Speeds are measured anew each time: a latency is never cached.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgemed import params as strict
from edgemed import plugins
from edgemed.artifacts import hashing, store
from edgemed.artifacts.json_files import read_json_object
from edgemed.benchmarking.spec import BenchSpec
from edgemed.console import plain_text, say
from edgemed.data.text_sets import IMAGES, image_questions, read_card
from edgemed.documents.bench import BenchRecord
from edgemed.documents.evaluation import EvalResult
from edgemed.documents.gate import GateVerdict
from edgemed.documents.machine import Machine
from edgemed.documents.manifest import Manifest
from edgemed.documents.run import SCHEMA, RunDocument
from edgemed.documents.verify import VerifyResult
from edgemed.documents.witness import WitnessResult
from edgemed.engines.engine import Engine, export
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError, need
from edgemed.evaluation.evaluate import SOURCE, judge, pair, part_of, source_key
from edgemed.evaluation.opened_model import OpenedModel, evaluate_opened, open_source, start_engine
from edgemed.evaluation.prompting import parse_strategy
from edgemed.evaluation.spec import EvalSpec
from edgemed.evaluation.task import Questions, questions
from edgemed.hardware.child_process import run_child
from edgemed.hardware.device import machine
from edgemed.models.checkpoint import Checkpoint, is_gguf, open_checkpoint
from edgemed.models.random_weights import make_random
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.engine_run import EngineRun
from edgemed.pipeline.recipe import Recipe, Stage
from edgemed.pipeline.references import adapted_references, reference_for, with_images
from edgemed.pipeline.report_document import (
    describe,
    device_asked_for,
    entry,
    not_measured,
)
from edgemed.provenance import record
from edgemed.reporting.report import write
from edgemed.verification.parity import Limits, verify, with_adapters
from edgemed.verification.witness.witness import require_agreement, witness

RANDOM = "random:"


@dataclass
class Line:
    """The checkpoints a recipe passes through, by step name. source: the last one before any is
    quantized; witnessed: what the witness says of each, by its directory, of a quantized one what
    it says of the float checkpoint that it was made from.
    """

    points: dict[str, Checkpoint]
    source: Checkpoint
    last: Checkpoint
    witnessed: dict[Path, WitnessResult]
    manifests: list[Manifest] = field(default_factory=list)


def run(recipe: Recipe, work: Path) -> Path:
    """Execute a recipe in `work` and return the path of report.html (report.json and report.md lie
    beside it).

    Raises EdgemedError for anything a person can put right; a second call goes on from the last
    finished step.
    """
    work = Path(work)
    cache = work / "store"
    check_inputs(recipe, cache)
    line = run_steps(recipe, cache)
    references = engine_references(line, recipe, cache)
    runs = [
        EngineRun(run_target(stage, line, reference, recipe, work), reference)
        for stage, reference in zip(recipe.engines, references, strict=True)
    ]
    for each in runs:
        if each.reference:
            each.verified = verify_engine(each.engine, each.reference, recipe, cache)
    for each in runs:
        if recipe.bench and each.may_be_benched:
            each.records = bench_engine(each.engine, recipe)
    source_results = run_evals(line.source, runs, recipe, cache)
    gate = run_gate(runs, recipe)
    for each in runs:
        document_engine(each, line, recipe, gate)
    document = RunDocument(
        schema=SCHEMA,
        title=recipe.title,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        recipe=dict(recipe.document),
        device=device_asked_for(recipe),
        machine=Machine.from_json(machine()),
        source=describe(line.points["model"]),
        steps=tuple(line.manifests),
        witness=line.witnessed[line.points["model"].path],
        engines=tuple(entry(each, gate) for each in runs),
        source_evals=tuple(source_results),
        strategies=recipe.eval.strategies if recipe.eval else (),
        gate=gate,
        not_measured=tuple(not_measured(recipe, runs)),
    )
    content = document.to_json()
    store.write_json(work / "report.json", content)
    return write(content, work)


def agreed(
    checkpoint: Checkpoint, cache: Path, adapters: Mapping[str, str] | None = None
) -> WitnessResult:
    """What the witness says of a checkpoint, and of adapters on it (name -> PEFT directory).

    Raises EdgemedError where it reads it otherwise: nothing is built from a checkpoint that edgemed
    misreads.
    """
    result = witness(checkpoint, cache, adapters=adapters)
    require_agreement(checkpoint, result)
    return result


def engine_references(line: Line, recipe: Recipe, cache: Path) -> list[Reference | None]:
    """For every engine of a recipe the answers it is verified against, None where nothing is."""
    spec = recipe.verify
    if not spec or line.source.random_weights:
        return [None for _ in recipe.engines]
    reference = reference_for(line.source, spec, cache)
    return [with_images(reference, line.source, stage, spec, cache) for stage in recipe.engines]


def document_engine(run: EngineRun, line: Line, recipe: Recipe, gate: GateVerdict | None) -> None:
    """Put what was measured into the engine's manifest, and its model card and bill of materials
    beside it.
    """
    share = part_of(gate, run.engine.name)
    verified = run.verified
    record.document(
        run.engine.path,
        record.known_source(recipe.model, line.points["model"].path, run.engine.path),
        verified.to_json() if verified else None,
        [result.to_json() for result in run.evaluations],
        share.to_json() if share else None,
        recipe.verify.prompts if recipe.verify and verified else None,
        IMAGES if verified and verified.stages else None,
    )


def check_inputs(recipe: Recipe, cache: Path) -> None:
    """Find a missing model, adapter, text set, importance or task file in the first second, not
    after an hour of work. A model in a GGUF file is imported into `cache` first.
    """
    weights = None
    if not recipe.model.startswith(RANDOM):
        weights = CanonicalWeights(open_model(recipe.model, cache))
    for stage in recipe.steps:
        plugins.load("steps", stage.plugin).inputs(stage.params)
    for stage in recipe.engines:
        plugins.load("targets", stage.plugin).inputs(stage.params)
    need("cyclonedx", "bom")
    if recipe.verify:
        read_card(recipe.verify.prompts).digest("heldout")
        if weights and weights.vision:
            image_questions(recipe.verify.images)
    if recipe.eval:
        check_tasks(recipe.eval, recipe.model, weights)


def check_tasks(spec: EvalSpec, model: str, weights: CanonicalWeights | None) -> None:
    """Raises EdgemedError for a task or a strategy that is not known, and for a task with images
    that a text model is asked.
    """
    for task in spec.tasks:
        if questions(task).has_vision and weights and not weights.vision:
            raise EdgemedError(
                f"task {task} shows images, and {model} reads text only",
                "Leave the task out, or give a vision model",
            )
    for strategy in spec.strategies:
        parse_strategy(strategy)


def run_steps(recipe: Recipe, cache: Path) -> Line:
    """All steps of a recipe, one behind the other. The witness is asked about the model, and about
    every float checkpoint that a step makes, before the next step begins. Raises EdgemedError where
    it reads one otherwise.
    """
    model = open_model(recipe.model, cache)
    result = agreed(model, cache)
    line = Line({"model": model}, model, model, {model.path: result})
    for stage in recipe.steps:
        line.last = run_step(stage, line.last, cache)
        line.points[stage.plugin] = line.last
        line.manifests.append(Manifest.from_json(store.read_manifest(line.last.path)))
        if "quantization_config" not in line.last.config:
            line.source = line.last
            result = agreed(line.last, cache)
        line.witnessed[line.last.path] = result
    return line


def open_model(model: str, cache: Path) -> Checkpoint:
    """A checkpoint by directory or hub id. 'random:NAME' makes one of true dimensions with random
    weights under `cache`, and the path of a GGUF file imports it there.
    """
    if model.startswith(RANDOM):
        name = model.removeprefix(RANDOM)
        return make_random(name, cache / f"random-{name}")
    if is_gguf(model):
        from edgemed.gguf.import_checkpoint import import_gguf

        digest = hashing.file_sha256(Path(model))
        return import_gguf(model, cache / f"import-{digest[:12]}")
    return open_checkpoint(model)


def random_engine(name: str, target: str, values: Mapping[str, Any], work: Path) -> Path:
    """An engine of true dimensions with random weights, for latency and memory only. Raises
    EdgemedError where the witness reads its checkpoint otherwise.
    """
    module = plugins.load("targets", target)
    stage = Stage(target, strict.build(module.Params, values, target))
    checkpoint = open_model(f"random:{name}", work)
    out = work / f"{name}-{target}-{short(stage, module.inputs(stage.params))}"
    result = agreed(checkpoint, work, stage.params.adapters)
    return export(checkpoint, target, stage.params, out, name=out.name, witness=result).path


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
        store.read_manifest(checkpoint.path)
        if (checkpoint.path / store.MANIFEST).is_file()
        else None
    )
    with store.building(
        final, "checkpoint", stage.plugin, asdict(stage.params), inputs, parent
    ) as work:
        progress = "reused" if work is None else "running"
        say(f"{stage.plugin}: {progress} [dim]{plain_text(final)}[/dim]")
        if work is not None:
            work.notes.update(module.run(checkpoint, work.path, stage.params))
    return open_checkpoint(final)


def short(stage: Stage, inputs: Mapping[str, str]) -> str:
    return hashing.digest(
        {"plugin": stage.plugin, "params": asdict(stage.params), "inputs": dict(inputs)}
    )[:12]


def run_target(
    stage: Stage,
    line: Line,
    reference: Reference | None,
    recipe: Recipe,
    work: Path,
) -> Engine:
    """Compile one engine in the store, with a link to it under work/engines."""
    cache = work / "store"
    checkpoint = line.points[stage.start] if stage.start else line.last
    carried = None
    adapted: dict[str, Reference] = {}
    result = line.witnessed[checkpoint.path]
    if stage.params.adapters:
        # A quantized checkpoint's scores have no witness.
        is_quantized = "quantization_config" in checkpoint.config
        result = agreed(line.source if is_quantized else checkpoint, cache, stage.params.adapters)
    if reference and recipe.verify:
        carried = reference.trim(recipe.verify.carried)
        adapted = adapted_references(line.source, stage, recipe.verify, cache)
    inputs = checkpoint.hashes() | plugins.load("targets", stage.plugin).inputs(stage.params)
    inputs["reference"] = carried.digest() if carried else "none"
    inputs["name"] = stage.name
    for name, answers in adapted.items():
        inputs[f"reference/{name}"] = answers.digest()
    final = cache / f"{stage.name}-{short(stage, inputs)}"
    say(f"{stage.plugin}: {plain_text(stage.name)} [dim]{plain_text(final)}[/dim]")
    engine = export(
        checkpoint,
        stage.plugin,
        stage.params,
        final,
        carried,
        stage.name,
        adapted,
        result,
    )
    link = work / "engines" / stage.name
    link.parent.mkdir(exist_ok=True)
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(final, link.parent))
    os.replace(fresh, link)
    return engine


def verify_engine(
    engine: Engine, reference: Reference, recipe: Recipe, cache: Path
) -> VerifyResult:
    """Parity of an engine with its reference, from the store where it was computed before."""
    limits = Limits()
    if recipe.verify:
        limits = Limits(recipe.verify.max_kl, recipe.verify.min_top1)
    inputs = {
        "engine": engine.key,
        "reference": reference.digest(),
        "ran_on": engine.emulation or engine.target,
    }
    content = cached(
        cache,
        "verify",
        {"limits": asdict(limits)},
        inputs,
        lambda: with_adapters(engine, verify(engine, reference, limits), limits).to_json(),
    )
    result = VerifyResult.from_json(content, f"the verification of {engine.name}")
    verdict = "[green]passed[/green]"
    if not result.passed:
        verdict = f"[red]failed[/red]: {plain_text('; '.join(result.problems))}"
    say(f"verify: {plain_text(engine.name)} {verdict}")
    return result


def cached(
    cache: Path, stage: str, params: Mapping[str, Any], inputs: Mapping[str, Any], compute: Any
) -> dict[str, Any]:
    """A deterministic result, computed once for its inputs."""
    final = cache / f"{stage}-{hashing.digest([params, inputs])[:12]}"
    with store.building(final, "result", stage, params, inputs) as work:
        if work is not None:
            store.write_json(work.path / "result.json", compute())
    return read_json_object(final / "result.json", f"Remove {final} and run again")


def bench_engine(engine: Engine, recipe: Recipe) -> list[BenchRecord]:
    """Bench in a process of its own, so that peak memory is the engine's and not this build's."""
    spec = recipe.bench or BenchSpec()
    say(f"bench: {plain_text(engine.name)}")
    command = [sys.executable, "-m", "edgemed", "bench", str(engine.path), "--json"]
    command += ["--runs", str(spec.runs)]
    command += ["--generate", str(spec.generate)]
    for length in spec.prompt:
        command += ["--prompt", str(length)]
    command += ["--image", str(spec.image or 0)]
    if spec.threads:
        command += ["--threads", str(spec.threads)]
    if spec.wait_quiet is not None:
        command += ["--wait-quiet", str(spec.wait_quiet)]
    process = run_child(command)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise EdgemedError(
            f"bench of {engine.name} failed: {lines[-1]}",
            f"Run it alone: edgemed bench {engine.path}",
        )
    return [BenchRecord.from_json(content) for content in json.loads(process.stdout)]


def run_evals(
    source: Checkpoint, runs: Sequence[EngineRun], recipe: Recipe, cache: Path
) -> list[EvalResult]:
    """Every task in every strategy on the source, whose results are returned, and on every engine,
    paired item by item.
    """
    source_results: list[EvalResult] = []
    spec = recipe.eval
    if not spec or source.random_weights:
        return source_results
    for task in spec.tasks:
        asked = questions(task, spec.limit, spec.frame)
        say(
            f"eval: {plain_text(task)} on the source and {len(runs)} engines,"
            f" {len(asked.examples)} items, {', '.join(spec.strategies)}"
        )
        bases = evals_of(None, source, asked, spec, cache)
        source_results += bases
        for run in runs:
            if run.engine.emulation:
                continue
            manifest = store.read_manifest(run.engine.path)
            results = evals_of(run.engine, source, asked, spec, cache)
            for base, result in zip(bases, results, strict=True):
                run.evaluations.append(pair(result, base, manifest, spec.margin, spec.alpha))
    return source_results


def evals_of(
    engine: Engine | None, source: Checkpoint, asked: Questions, spec: EvalSpec, cache: Path
) -> list[EvalResult]:
    """One result per strategy, of an engine or (None) of the source; what was computed before is
    taken from the cache.
    """
    results = []
    settings = spec.settings()
    key = engine.key if engine else source_key(source.hashes())
    name = engine.name if engine else SOURCE
    opened: OpenedModel | None = None

    def compute(text: str) -> dict[str, Any]:
        nonlocal opened  # opened at the first strategy that is not in the cache, and used for all
        if opened is None and engine is None:
            opened = open_source(source, asked.has_vision)
        elif opened is None and engine is not None:
            opened = start_engine(engine, asked.has_vision)
        if opened is None:
            raise EdgemedError(f"{name} could not be opened", "Export it again")
        return evaluate_opened(opened, asked, name, key, text, settings).to_json()

    try:
        for text in spec.strategies:
            params = {"strategy": text, "settings": asdict(settings)}
            inputs = {"model": key, "task": asked.key}
            content = cached(cache, "eval", params, inputs, partial(compute, text))
            result = EvalResult.from_json(content, f"the result of {name}")
            # The same file may have been called otherwise when the result was computed.
            results.append(replace(result, file=asked.file))
    finally:
        if opened:
            opened.close()
    return results


def run_gate(runs: Sequence[EngineRun], recipe: Recipe) -> GateVerdict | None:
    """The verdict over all engines, None where the recipe names no margin or nothing was paired."""
    if not recipe.eval or recipe.eval.margin is None:
        return None
    results = {run.engine.name: run.evaluations for run in runs}
    gate = judge(results, recipe.eval.margin, recipe.eval.alpha)
    colours = {"pass": "green", "undecided": "yellow", "fail": "red"}
    for run in runs:
        if share := part_of(gate, run.engine.name):
            say(f"gate: {plain_text(run.engine.name)} [{colours[share.verdict]}]{share.verdict}[/]")
    return gate
