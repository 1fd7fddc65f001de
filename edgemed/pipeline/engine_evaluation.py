"""Evaluates one engine on tasks and pairs it, item by item, with its float32 source, with earlier
results of that, or with another engine.

A recipe evaluates many engines and keeps what it computed; here is the same for one engine by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemed.artifacts import store
from edgemed.artifacts.json_files import read_json_object
from edgemed.documents.eval_document import EvalDocument
from edgemed.documents.evaluation import EvalResult
from edgemed.engines.engine import Engine, require_built
from edgemed.engines.loaded_engine import open_engine
from edgemed.errors import EdgemedError, extras_named
from edgemed.evaluation.evaluate import (
    SOURCE,
    adapter_of,
    judge,
    pair,
    pair_engines,
    source_key,
)
from edgemed.evaluation.opened_model import (
    OpenedModel,
    evaluate_opened,
    open_source,
    start_engine,
)
from edgemed.evaluation.spec import EvalSpec
from edgemed.evaluation.task import questions
from edgemed.models import lora
from edgemed.models.checkpoint import open_checkpoint

WITH_SOURCE = "Give a file written by edgemed eval ENGINE --source MODEL --out FILE"


@extras_named()
def evaluate_tasks(
    engine: str | Path | Engine,
    spec: EvalSpec,
    source: str | None = None,
    against: str | Path | None = None,
    threads: int | None = None,
    adapter: str | None = None,
) -> EvalDocument:
    """Evaluate an engine on tasks, and pair it item by item with its float32 source.

    source: the checkpoint, evaluated too (needs torch); against: a file of results of the source,
    written by --out where it was evaluated, or the directory of another engine, such as the one in
    service, which is evaluated too and stands in the source's place. adapter: one of the engine's,
    with which the source is then evaluated as well (from the PEFT directory it was exported from).
    Raises EdgemedError where results do not belong together.
    """
    if source and against:
        raise EdgemedError(
            "give either a source or a file of its results",
            "Leave one of --source and --against out",
        )
    opened = open_engine(engine, check=True)
    settings = spec.settings()
    require_built(opened, "evaluate")
    in_service, earlier = _compared_with(against)
    every = [questions(task, spec.limit, spec.frame) for task in spec.tasks]
    has_vision = any(asked.has_vision for asked in every)
    model = start_engine(opened, has_vision, threads, adapter)
    manifest = store.read_manifest(opened.path)
    name = opened.name
    key = opened.key
    adapter = None if adapter == opened.default else adapter
    adapter_files: dict[str, str] = {}
    if adapter:
        adapter_files = adapter_of(manifest, adapter)
        name = f"{name}+{adapter}"
        key = source_key({"engine": key} | adapter_files)
    other: ComparedModel | None = None
    if source:
        checkpoint = open_checkpoint(source)
        exported = _exported(opened, adapter, adapter_files)
        other = ComparedModel(
            model=open_source(checkpoint, has_vision, adapter=exported),
            name=SOURCE,
            key=source_key(checkpoint.hashes() | adapter_files),
            is_engine=False,
        )
    elif in_service:
        other = _engine_in_service(in_service, opened.name, has_vision, threads)
    bases = []
    results = []
    try:
        for asked in every:
            for text in spec.strategies:
                base = None
                if other:
                    base = evaluate_opened(
                        other.model, asked, other.name, other.key, text, settings
                    )
                result = evaluate_opened(model, asked, name, key, text, settings)
                if earlier:
                    base = same_question(earlier, result, str(against))
                if base:
                    bases.append(base)
                    result = (
                        pair_engines(result, base, spec.margin, spec.alpha)
                        if in_service
                        else pair(result, base, manifest, spec.margin, spec.alpha, adapter)
                    )
                results.append(result)
    finally:
        model.close()
        if other and other.is_engine:
            other.model.close()
    gate = None
    if spec.margin is not None:
        gate = judge({name: results}, spec.margin, spec.alpha)
    return EvalDocument(source=tuple(bases), engine=tuple(results), gate=gate)


def _compared_with(against: str | Path | None) -> tuple[Path | None, list[EvalResult]]:
    """(directory of another engine, earlier results), of which `against` is one."""
    if against is None:
        return None, []
    if Path(against).is_dir():
        return Path(against), []
    return None, read_results(against)


@dataclass(frozen=True)
class ComparedModel:
    """What an engine is compared with, opened: its source, or another engine. name, key: as model
    and model_key of its results.
    """

    model: OpenedModel
    name: str
    key: str
    is_engine: bool


def _engine_in_service(
    directory: Path, candidate: str, has_vision: bool, threads: int | None
) -> ComparedModel:
    """Another engine, opened as the one to compare with. candidate: the name of the engine that may
    take its place.
    """
    engine = open_engine(directory, check=True)
    require_built(engine, "evaluate")
    name = engine.name if engine.name != candidate else f"{engine.name} (in service)"
    return ComparedModel(
        model=start_engine(engine, has_vision, threads),
        name=name,
        key=engine.key,
        is_engine=True,
    )


def _exported(
    engine: Engine, adapter: str | None, hashes: dict[str, str]
) -> tuple[str, str] | None:
    """(name, PEFT directory) of one of an engine's adapters, the directory as it was at the export.
    Raises EdgemedError where it has changed or is gone.
    """
    if adapter is None or adapter == lora.BASE:
        return None
    path = engine.params["adapters"][adapter]
    if lora.inputs({adapter: path}) != hashes:
        raise EdgemedError(
            f"{path} is not the adapter '{adapter}' that {engine.path} was exported with",
            "Export the engine again, or give --against instead of --source",
        )
    return adapter, path


def read_results(path: str | Path) -> list[EvalResult]:
    """The source's results in a file written by `edgemed eval --out`. Raises EdgemedError where it
    is none.
    """
    document = read_json_object(Path(path), "Give a file written by edgemed eval --out")
    contents = document.get("source")
    if not isinstance(contents, list):
        raise EdgemedError(f"{path} holds no results of a source", WITH_SOURCE)
    results = [
        EvalResult.from_json(content, f"{path}: source[{number}]")
        for number, content in enumerate(contents)
    ]
    return [result for result in results if result.items is not None and result.model_key]


def same_question(earlier: Sequence[EvalResult], result: EvalResult, where: str) -> EvalResult:
    """The earlier result on the same task and strategy; whether it is truly comparable is for
    pair() to check.
    """
    asked = (result.task, result.strategy)
    alike = [each for each in earlier if (each.task, each.strategy) == asked]
    if not alike:
        names = ", ".join(f"{each.task} {each.strategy}" for each in earlier)
        raise EdgemedError(
            f"{where} has no result on {result.task} with {result.strategy}",
            f"It has: {names or 'none'}",
        )
    for each in alike:
        if each.task_key == result.task_key:
            return each
    return alike[0]
