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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed import params as strict
from edgemed import plugins
from edgemed.artifacts import store
from edgemed.console import say
from edgemed.data.text_sets import IMAGES, image_questions, read_card, texts
from edgemed.engines.engine import Engine, check_supported, export, pixels_of
from edgemed.engines.image_reference import ImageReference, make_image_reference
from edgemed.engines.reference import Reference, make_reference, windows_of
from edgemed.errors import EdgemedError, need
from edgemed.evaluation.evaluate import SOURCE, evaluate, judge, pair, part_of, source_key
from edgemed.evaluation.prompting import Eyes, Settings, parse
from edgemed.evaluation.task import Questions, questions
from edgemed.hardware.device import machine, read_device
from edgemed.inference.session import Session
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.lora import adapter_hashes, answering
from edgemed.models.random_weights import make_random
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.weights import Weights
from edgemed.onnx.vision_encoder import eyes_of
from edgemed.pipeline.recipe import EvalSpec, Recipe, Stage, VerifySpec
from edgemed.planning.inspect import parameters
from edgemed.provenance import record
from edgemed.reporting.report import write
from edgemed.reporting.verdicts import on_device
from edgemed.verification.parity import Limits, verify, with_adapters
from edgemed.vision.preprocessing import Patches, check_places, patches, prompt_tokens

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Route

RANDOM = "random:"


@dataclass(frozen=True)
class Opened:
    """A model ready to be evaluated. eos: its end-of-text token; eyes: where it shall see."""

    session: Session
    tokenizer: Any
    eos: int | None
    eyes: Eyes | None = None

    def close(self) -> None:
        self.session.close()
        if self.eyes:
            self.eyes.close()


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
            if recipe.bench and not engine.stand_in and (result is None or result["passed"])
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
    weights = None if recipe.model.startswith(RANDOM) else Weights(open_checkpoint(recipe.model))
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
        if questions(spec).sees and weights and not weights.vision:
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
    return store.digest(
        {"plugin": stage.plugin, "params": asdict(stage.params), "inputs": dict(inputs)}
    )[:12]


def reference_for(
    source: Checkpoint, spec: VerifySpec, cache: Path, adapter: tuple[str, str] | None = None
) -> Reference:
    """The float32 source's answers on held-out text, with an adapter or as it is, made once per
    source and specification and kept in `cache`.
    """
    inputs = (
        source.hashes()
        | {"heldout": read_card(spec.prompts).digest("heldout")}
        | (adapter_hashes(adapter[1]) if adapter else {})
    )
    settings = {
        k: v for k, v in asdict(spec).items() if k in ("prompts", "count", "width", "prompt", "new")
    }
    final = cache / f"reference-{store.digest([settings, inputs])[:12]}"
    with store.building(final, "reference", "reference", settings, inputs) as work:
        say(
            f"reference answers{f' with {adapter[0]}' if adapter else ''}:"
            f" {'reused' if work is None else 'running'} [dim]{final}[/dim]"
        )
        if work is not None:
            answers(source, spec, adapter).save(work.path)
    return Reference.load(final)


def adapted_references(
    source: Checkpoint, stage: Stage, spec: VerifySpec, cache: Path
) -> dict[str, Reference]:
    """adapter -> what the source with it answers, for every adapter that an engine is given, kept
    in `cache`.
    """
    given = (stage.params.adapters or {}).items()
    return {
        one[0]: (
            with_images(
                reference_for(source, spec, cache, one), source, stage, spec, cache, one
            ).trim(spec.carried)
        )
        for one in given
    }


def answers(
    source: Checkpoint, spec: VerifySpec, adapter: tuple[str, str] | None = None
) -> Reference:
    """Run the float32 source, with an adapter (name, PEFT directory) or as it is, over the held-out
    windows of `spec`.
    """
    from edgemed.models.torch_decoder import TorchSession

    weights = answering(source, adapter)
    tokenizer = open_tokenizer(source.path, weights.decoder.vocab)
    windows = windows_of(
        [encode(tokenizer, t) for t in texts(spec.prompts, "heldout")],
        spec.count,
        spec.width,
        spec.prompts,
    )
    return make_reference(TorchSession(weights), windows, spec.prompt, spec.new)


def with_images(
    reference: Reference,
    source: Checkpoint,
    stage: Stage,
    spec: VerifySpec,
    cache: Path,
    adapter: tuple[str, str] | None = None,
) -> Reference:
    """The same with the source's answers about images as this engine resizes them, with an adapter
    or as it is, kept in `cache`; a text model's as they are.
    """
    weights = Weights(source)
    if not weights.vision:
        return reference
    check_supported(stage.plugin, weights, stage.params)
    pixels = pixels_of(weights.vision, stage.params)
    inputs = (
        source.hashes()
        | {split: read_card(IMAGES).digest(split) for split in read_card(IMAGES).files}
        | (adapter_hashes(adapter[1]) if adapter else {})
    )
    settings = {"images": spec.images, "image_new": spec.image_new, "pixels": list(pixels)}
    final = cache / f"images-{store.digest([settings, inputs])[:12]}"
    with store.building(final, "reference", "images", settings, inputs) as work:
        say(
            f"reference answers about images{f' with {adapter[0]}' if adapter else ''}:"
            f" {'reused' if work is None else 'running'} [dim]{final}[/dim]"
        )
        if work is not None:
            replace(reference, images=image_answers(source, spec, pixels, adapter)).save(work.path)
    return replace(reference, images=Reference.load(final).images)


def image_answers(
    source: Checkpoint,
    spec: VerifySpec,
    pixels: tuple[int, int],
    adapter: tuple[str, str] | None = None,
) -> ImageReference:
    """Show the float32 source, with an adapter or as it is, the images of `spec`, resized to
    `pixels` (least, most). Raises EdgemedError where the card has fewer.
    """
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.vision import torch_encoder

    weights = answering(source, adapter)
    v = replace(weights.vision, pixels=pixels)
    tokenizer = open_tokenizer(source.path, weights.decoder.vocab)
    family = weights.family

    def look(image: Any) -> tuple[Patches, Any, Any]:
        found = patches(image, v)
        made = torch_encoder.features(weights, found)
        return found, made["tower"].numpy(), made["features"].numpy()

    asked = [
        (prompt_tokens(tokenizer, family.chat(question, 1, v.conversation), v), image)
        for question, image in image_questions(spec.images)
    ]
    for tokens, _ in asked:
        check_places(tokens, v.token, 1)
    parts = max(weights.decoder.rope_axes, default=0) + 1
    return make_image_reference(
        TorchSession(weights),
        look,
        [(tokens, np.asarray(image)) for tokens, image in asked],
        spec.image_new,
        v,
        parts,
    )


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
        "ran_on": engine.stand_in or engine.target,
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
    final = cache / f"{stage}-{store.digest([params, inputs])[:12]}"
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
            if engine.stand_in:
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
            open_source(source, asked.sees) if engine is None else start_engine(engine, asked.sees)
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


def open_source(
    source: Checkpoint,
    sees: bool = False,
    route: Route | None = None,
    adapter: tuple[str, str] | None = None,
) -> Opened:
    """The float32 source, with an adapter (name, PEFT directory) or as it is, as a session, with
    its tokenizer and end-of-text token.

    sees: with its eyes; raises EdgemedError where it has none. route: as TorchSession.
    """
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.vision.torch_encoder import TorchEyes

    weights = answering(source, adapter)
    eyes = TorchEyes(weights) if sees else None
    return Opened(
        TorchSession(weights, route=route),
        open_tokenizer(source.path, weights.decoder.vocab),
        weights.decoder.eos,
        eyes,
    )


def start_engine(
    engine: Engine, sees: bool = False, threads: int | None = None, adapter: str | None = None
) -> Opened:
    """An engine, with one of its adapters or as its base, in the same form."""
    eyes = eyes_of(engine, threads) if sees else None
    return Opened(
        engine.open(threads, adapter),
        engine.tokenizer(),
        engine.eos,
        eyes,
    )


def evaluate_opened(
    opened: Opened, asked: Questions, name: str, key: str, strategy: str, settings: Settings
) -> dict[str, Any]:
    stop = frozenset() if opened.eos is None else frozenset({opened.eos})
    return evaluate(
        opened.session, opened.tokenizer, asked, name, key, strategy, settings, stop, opened.eyes
    )


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


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    weights = Weights(checkpoint)
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
        f" measured; parity is that of {e.stand_in}."
        for e in engines
        if e.stand_in
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
