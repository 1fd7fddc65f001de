"""The Python API: the few functions behind both `import edgemed` and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemed import params as strict
from edgemed import plugins
from edgemed.artifacts import store
from edgemed.artifacts.records import append_records
from edgemed.data.text_sets import IMAGES
from edgemed.engines import engine as engines
from edgemed.engines.engine import Engine, check_supported, open_engine, require_built
from edgemed.errors import EdgemedError, extras_named, nearest
from edgemed.evaluation.evaluate import SOURCE, adapter_of, judge, pair, source_key
from edgemed.evaluation.opened_model import evaluate_opened, open_source, start_engine
from edgemed.evaluation.spec import EvalSpec
from edgemed.evaluation.task import questions
from edgemed.hardware import process_memory
from edgemed.inference.decoding import Sampling, generate
from edgemed.inference.session import ImageEmbeddings, Session
from edgemed.models import lora
from edgemed.models.architecture import Architecture
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import chat_text, encode
from edgemed.models.weights import CanonicalWeights
from edgemed.onnx.vision_encoder import open_vision
from edgemed.planning.inspect import inspect
from edgemed.provenance import record
from edgemed.vision.image_io import open_image
from edgemed.vision.preprocessing import check_places, prompt_tokens, vision_of

__all__ = ["build", "chat", "evaluate_tasks", "export", "inspect", "run", "stream"]

# Reference answers of a single export: few and short texts, because a large source is slow on a CPU
# (a recipe's verify: asks for more); but all images.
EXPORT_REFERENCE = {"count": 4, "width": 64, "prompt": 32, "new": 16, "carried": 2}


@extras_named()
def run(recipe: str | Path, work: str | Path | None = None, sets: Sequence[str] = ()) -> Path:
    """Run a recipe file or shipped recipe; returns the path of report.html. sets:
    ['quantize.bits=8', ...].
    """
    from edgemed.pipeline.recipe import read_recipe
    from edgemed.pipeline.runner import run as run_recipe

    return run_recipe(
        read_recipe(recipe, sets), Path(work) if work else Path("runs") / Path(recipe).stem
    )


@extras_named()
def export(
    model: str,
    target: str,
    out: str | Path,
    prompts: str | None = "pubmedqa-abstracts",
    source: str | None = None,
    **params: Any,
) -> Engine:
    """Compile one engine directory. params: the target's parameters, e.g. precision='int4'.

    prompts: text set for the reference answers that travel along (None: none). source: float
    checkpoint they come from. Raises EdgemedError for everything a person can put right.
    """
    from edgemed.pipeline.references import answers, image_answers
    from edgemed.pipeline.runner import open_model
    from edgemed.verification.spec import VerifySpec

    out = Path(out)
    module = plugins.load("targets", target)
    built = strict.build(module.Params, params, target)
    module.inputs(built)  # finds a missing file before the reference answers are computed
    checkpoint = open_model(model, out.parent)
    reference = None
    adapted = {}
    if prompts and not checkpoint.random_weights:
        origin = open_model(source, out.parent) if source else checkpoint
        seen = CanonicalWeights(checkpoint).vision
        spec = VerifySpec(prompts, **EXPORT_REFERENCE)
        check_supported(
            target, CanonicalWeights(checkpoint), built
        )  # before an hour of reference answers
        told = {}
        for one in (None, *(built.adapters or {}).items()):
            images = (
                image_answers(origin, spec, engines.pixels_of(seen, built), one) if seen else None
            )
            told[one] = replace(answers(origin, spec, one), images=images).trim(spec.carried)
        reference = told.pop(None)
        adapted = {name: found for (name, _), found in told.items()}
    engine = engines.export(checkpoint, target, built, out, reference, adapted=adapted)
    record.document(
        engine.path,
        record.known_source(model, checkpoint.path, engine.path),
        heldout=prompts if reference else None,
        images=IMAGES if reference and reference.images else None,
    )
    return engine


@extras_named()
def build(
    engine: str | Path, workspace_mb: int | None = None, measure: bool = True
) -> dict[str, Any]:
    """Finish an engine on its device: compile, then verify and (measure) bench it. Returns plan
    (its manifest), verify and records.

    verify is None where the engine carries no reference answers; nothing is measured where it
    failed. Raises EdgemedError as engine.finish.
    """
    from edgemed.benchmarking.bench import bench, image_tokens
    from edgemed.benchmarking.spec import BenchSpec
    from edgemed.engines.reference import FILE as REFERENCE
    from edgemed.verification.parity import Limits, verify

    opened = open_engine(engine, check=True)
    plan = engines.finish(opened, workspace_mb)
    result = (
        verify(opened, opened.reference(), Limits())
        if (opened.path / REFERENCE).is_file()
        else None
    )
    records: list[dict[str, Any]] = []
    if measure and (result is None or result["passed"]):
        process_memory.reset_peak_memory()
        lengths = tuple(
            length
            for length in BenchSpec().prompt
            if length + BenchSpec().generate < opened.context
        ) or (max(1, opened.context // 2),)
        side = (
            BenchSpec().image
            if opened.vision
            and image_tokens(opened, BenchSpec().image) + min(lengths) <= opened.context
            else 0
        )
        records = bench(opened, BenchSpec(lengths, image=side))
        append_records(opened.path, records)
    return {"plan": plan, "verify": result, "records": records}


@extras_named()
def evaluate_tasks(
    engine: str | Path,
    spec: EvalSpec,
    source: str | None = None,
    against: str | Path | None = None,
    threads: int | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Evaluate an engine on tasks, and pair it item by item with its float32 source.

    source: the checkpoint, evaluated too (needs torch); against: a file of results of the source,
    written by --out where it was evaluated. adapter: one of the engine's, with which the source is
    then evaluated as well (from the PEFT directory it was exported from). Returns {'source':
    results, 'engine': paired results, 'gate': verdict or None}. Raises EdgemedError where results
    do not belong together.
    """
    if source and against:
        raise EdgemedError(
            "give either a source or a file of its results",
            "Leave one of --source and --against out",
        )
    opened = open_engine(engine, check=True)
    settings = spec.settings()
    require_built(opened, "evaluate")
    known = read_results(against) if against else []
    bases = []
    results = []
    every = [questions(task, spec.limit) for task in spec.tasks]
    has_vision = any(asked.has_vision for asked in every)
    model = start_engine(opened, has_vision, threads, adapter)
    name = opened.name
    key = opened.key
    manifest = store.read_manifest(opened.path)
    adapter = None if adapter == opened.default else adapter
    own = adapter_of(manifest, adapter) if adapter else {}
    if adapter:
        name = f"{name}+{adapter}"
        key = source_key({"engine": key} | own)
    base_model = (
        open_source(open_checkpoint(source), has_vision, adapter=_exported(opened, adapter, own))
        if source
        else None
    )
    try:
        for asked in every:
            for text in spec.strategies:
                base = (
                    evaluate_opened(
                        base_model,
                        asked,
                        SOURCE,
                        source_key(open_checkpoint(source).hashes() | own),
                        text,
                        settings,
                    )
                    if source
                    else None
                )
                result = evaluate_opened(model, asked, name, key, text, settings)
                base = base or (same_question(known, result, str(against)) if against else None)
                results.append(
                    pair(result, base, manifest, spec.margin, spec.alpha, adapter)
                    if base
                    else result
                )
                if base:
                    bases += [base]
    finally:
        model.close()
    gate = judge({name: results}, spec.margin, spec.alpha) if spec.margin is not None else None
    return {"source": bases, "engine": results, "gate": gate}


def _exported(
    engine: Engine, adapter: str | None, hashes: dict[str, str]
) -> tuple[str, str] | None:
    """(name, PEFT directory) of one of an engine's adapters, the directory as it was at the export.
    Raises EdgemedError where it has changed or is gone.
    """
    if adapter in (None, lora.BASE):
        return None
    path = engine.params["adapters"][adapter]
    if lora.inputs({adapter: path}) != hashes:
        raise EdgemedError(
            f"{path} is not the adapter '{adapter}' that {engine.path} was exported with",
            "Export the engine again, or give --against instead of --source",
        )
    return adapter, path


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The source's results in a file written by `edgemed eval --out`. Raises EdgemedError where it
    is none.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        return [
            result
            for result in document["source"]
            if result["items"] is not None and result["model_key"]
        ]
    except OSError as error:
        raise EdgemedError(
            f"{path} cannot be read: {error.strerror}", "Give a file written by edgemed eval --out"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise EdgemedError(
            f"{path} holds no results of a source",
            "Give a file written by edgemed eval ENGINE --source MODEL --out FILE",
        ) from None


def same_question(
    known: Sequence[dict[str, Any]], result: dict[str, Any], where: str
) -> dict[str, Any]:
    """The result in `known` on the same task and strategy; whether it is truly comparable is for
    pair() to check.
    """
    found = [k for k in known if (k["task"], k["strategy"]) == (result["task"], result["strategy"])]
    if not found:
        held = ", ".join(f"{k['task']} {k['strategy']}" for k in known)
        raise EdgemedError(
            f"{where} has no result on {result['task']} with {result['strategy']}",
            f"It has: {held or 'none'}",
        )
    return next((k for k in found if k["task_key"] == result["task_key"]), found[0])


def stream(
    engine: str | Path,
    prompt: str,
    sampling: Sampling,
    threads: int | None = None,
    images: Sequence[str | Path] = (),
    template: str | None = None,
    adapter: str | None = None,
) -> Iterator[str]:
    """Continue a text, or answer a question about images; yields pieces of text as they are
    decoded. adapter: one of the engine's, None for its base.

    template: 'chat' (one user turn in the model's own form), 'reasoning' (that with the
    instructions of a reasoning fine-tune) or 'none' (the text as it is); default: 'chat' where
    there are images, else 'none'.
    """
    opened = open_engine(engine)
    require_built(opened, "generate from")
    if opened.random_weights:
        raise EdgemedError(
            f"{engine} has random weights and no tokenizer",
            "Use edgemed bench; it is good for latency and memory only",
        )
    pictures = [open_image(image) for image in images]
    vision_encoder = open_vision(opened, threads) if pictures else None
    text = templated(opened, prompt, len(pictures), template or ("chat" if pictures else "none"))
    v = vision_of(opened.vision) if opened.vision else None
    tokens = prompt_tokens(opened.tokenizer(), text, v)
    if v:
        check_places(tokens, v.token, len(pictures))
    tokens, seen = vision_encoder.see(tokens, pictures) if vision_encoder else (tokens, None)
    session = opened.open(threads, adapter)
    try:
        yield from _words(opened, session, tokens, sampling, seen)
    finally:
        session.close()


@extras_named()
def templated(engine: Engine, text: str, images: int, template: str) -> str:
    """A user's text as the prompt a model was trained on. Raises EdgemedError for a template this
    engine's family does not have.
    """
    if template == "none":
        return text
    family: Architecture = plugins.load("families", engine.family).FAMILY
    known = [
        name for name, there in (("chat", family.chat), ("reasoning", family.reasoning)) if there
    ] + ["none"]
    if template not in known:
        raise EdgemedError(
            f"family {family.name} has no template '{template}'", nearest(template, known)
        )
    return family.chat(
        family.reasoning(text) if template == "reasoning" else text,
        images,
        vision_of(engine.vision).conversation,
    )


def _words(
    engine: Engine,
    session: Session,
    tokens: Sequence[int],
    sampling: Sampling,
    pictures: ImageEmbeddings | None = None,
) -> Iterator[str]:
    tokenizer = engine.tokenizer()
    found = []
    shown = ""
    stop = frozenset() if engine.eos is None else frozenset({engine.eos})
    for token in generate(session, tokens, sampling, stop, pictures):
        found.append(token)
        text = tokenizer.decode(found)
        # Half a UTF-8 character decodes to the replacement sign: wait for the rest.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


@extras_named()
def chat(
    engine: str | Path, sampling: Sampling, threads: int | None = None, adapter: str | None = None
) -> None:
    """Read lines from standard input and answer each, the conversation kept in the prompt."""
    opened = open_engine(engine)
    require_built(opened, "talk to")
    if opened.random_weights:
        raise EdgemedError(
            f"{engine} has random weights and no tokenizer",
            "Use edgemed bench; it is good for latency and memory only",
        )
    tokenizer = opened.tokenizer()
    session = opened.open(threads, adapter)
    messages = []
    eos = tokenizer.id_to_token(opened.eos) if opened.eos is not None else ""
    try:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            tokens = encode(tokenizer, chat_text(opened.path, messages, eos))
            session.rewind(0)
            answer = ""
            for word in _words(opened, session, tokens, sampling):
                print(word, end="", flush=True)
                answer += word
            print()
            messages.append({"role": "assistant", "content": answer.strip()})
    finally:
        session.close()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
