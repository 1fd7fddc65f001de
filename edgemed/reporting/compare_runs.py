"""Reads finished runs and single engines back from their directories, so that they can be reported
again or side by side.

An engine that came back from a device carries its records with it; it becomes a small run document
of its own, and takes the same way through the report as a whole run does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed.artifacts import lineage, store
from edgemed.artifacts.json_files import read_json, read_json_object
from edgemed.artifacts.records import read_records
from edgemed.documents.bench import BenchRecord
from edgemed.documents.gate import EngineGate, GateVerdict
from edgemed.documents.manifest import Manifest
from edgemed.documents.run import SCHEMA, EngineEntry, RunDocument, Source
from edgemed.documents.witness import WitnessResult
from edgemed.engines.engine import ENGINE, read_engine
from edgemed.errors import EdgemedError
from edgemed.reporting import report
from edgemed.reporting.view_model import Run, machine_name

Json = Mapping[str, Any]
FIX = "Give directories made by edgemed run or edgemed export"
AGAIN = "Run the recipe again"
LARGEST = 128 << 20  # bytes of report.json, which holds every single answer


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Run documents of run and engine directories, each labelled by the shortest end of its path
    that tells it apart.

    Raises EdgemedError for a directory that holds neither, a document of another schema, and for
    the same run given twice.
    """
    documents: list[Json] = []
    for directory in directories:
        document = read_document(directory)
        for other, earlier in zip(directories, documents, strict=False):
            if directory.resolve() == other.resolve() or document == earlier:
                raise EdgemedError(
                    f"{other} and {directory} hold the same run", "Name each run once"
                )
        documents.append(document)
    names = labels(directories) if len(documents) > 1 else [""]
    return [Run(document, name) for document, name in zip(documents, names, strict=True)]


def labels(directories: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes for all to differ."""
    # As it was named, not where a link leads: runs/x/engines/onnx-int4 is a link into the store.
    parts = [Path(os.path.abspath(directory)).parts for directory in directories]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]).lstrip("/") for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def read_document(directory: Path) -> Json:
    """The run document of a run directory, or one made from an engine directory."""
    if not directory.is_dir():
        raise EdgemedError(f"{directory} is not a directory", FIX)
    file = directory / "report.json"
    if file.is_file():
        document = read_json(file, AGAIN, LARGEST)
        report.check(document, str(directory))
        return document
    if (directory / store.MANIFEST).is_file():
        return engine_document(directory)
    raise EdgemedError(f"{directory} has no report.json and no {store.MANIFEST}", FIX)


def engine_document(directory: Path) -> dict[str, Any]:
    """A run document of one engine, from its manifest, engine.json and records. Raises EdgemedError
    where it is no engine.
    """
    manifest = Manifest.from_json(store.read_manifest(directory), f"{directory}/{store.MANIFEST}")
    if manifest.kind != "engine" or not (directory / ENGINE).is_file():
        raise EdgemedError(f"{directory} is a {manifest.kind}, not a run or an engine", FIX)
    read_engine(directory)
    engine = read_json_object(directory / ENGINE, AGAIN)
    contents = read_records(directory)
    records = [
        BenchRecord.from_json(content, f"a record of {directory}")
        for content in contents
        if content["engine_key"] == manifest.key
    ]
    entries = engine_entries(directory, manifest, engine, records)
    results = manifest.evals or ()
    document = RunDocument(
        schema=SCHEMA,
        title=engine["name"],
        created=manifest.created,
        recipe={},
        device=None,
        machine=records[-1].machine if records else None,
        source=origin(manifest, engine),
        steps=earlier_steps(manifest),
        witness=witness_in(manifest),
        engines=tuple(entries),
        source_evals=manifest.source_evals or (),
        strategies=tuple(dict.fromkeys(result.strategy for result in results)),
        gate=whole_gate(manifest.gate),
        not_measured=tuple(missing(engine["name"], entries[0], len(contents) - len(records))),
    )
    return document.to_json()


def witness_in(manifest: Manifest) -> WitnessResult | None:
    """What the witness found out about the checkpoint, None where it was not asked."""
    content = manifest.notes.get("witness")
    return None if content is None else WitnessResult.from_json(content, "the witness")


def whole_gate(share: EngineGate | None) -> GateVerdict | None:
    """The verdict over the only engine of a page, from its share of a run's."""
    if share is None:
        return None
    return GateVerdict(
        verdict=share.verdict,
        margin=share.margin,
        alpha=share.alpha,
        correction=share.correction or "Holm",
        comparisons=share.comparisons,
    )


def engine_entries(
    directory: Path, manifest: Manifest, engine: Json, records: Sequence[BenchRecord]
) -> list[EngineEntry]:
    """One entry per machine the engine was measured on. Speeds of two machines are two rows; what
    the engine answers is the same on both and stands in the first.

    engine: what engine.json says.
    """
    by_machine: dict[str, list[BenchRecord]] = {}
    for record in records:
        by_machine.setdefault(machine_name(record.machine), []).append(record)
    groups = list(by_machine.items()) or [("", [])]
    verified = manifest.verify
    entries = []
    for number, (machine, measured) in enumerate(groups):
        entries.append(
            EngineEntry(
                name=engine["name"] if len(groups) == 1 else f"{engine['name']} on {machine}",
                target=engine["target"],
                precision=engine["precision"],
                path=str(directory),
                bytes=sum(file.bytes for file in manifest.files.values() if not file.attached),
                manifest=manifest,
                verify=verified,
                records=tuple(latest(measured)),
                evals=(manifest.evals or ()) if number == 0 else (),
                gate=manifest.gate if number == 0 else None,
                stages=(verified.stages or ()) if verified else (),
            )
        )
    return entries


def earlier_steps(manifest: Manifest) -> tuple[Manifest, ...]:
    """The manifests of the steps an engine was made by, in order."""
    chain = [Manifest.from_json(made) for _, made in lineage.ancestors(manifest.to_json())]
    return tuple(reversed(chain[1:]))


def origin(manifest: Manifest, engine: Json) -> Source:
    """What is known of the checkpoint everything began with: its files, and its name where the
    engine carries it.
    """
    *_, (_, oldest) = lineage.ancestors(manifest.to_json())
    return Source(
        path=manifest.source.name if manifest.source else None,
        family=engine["family"],
        parameters=None,
        files=lineage.read(oldest),
        random_weights=engine["random_weights"],
    )


def latest(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """The newest record of each number, of the last thread count used; records are only ever
    appended.
    """
    threads = records[-1].how.get("threads") if records else None
    newest = {}
    for record in records:
        if record.how.get("threads") == threads:
            condition = (record.how.get("prompt"), record.how.get("generate"))
            newest[record.name, *condition] = record
    return list(newest.values())


def missing(name: str, first: EngineEntry, foreign: int) -> list[str]:
    """What a reader of a lone engine's page might take for granted. foreign: how many records
    belong to another engine.
    """
    sentences = []
    if not first.verify:
        sentences.append(
            f"{name}: whether it answers as its source does is not recorded in the engine directory"
            " (edgemed verify checks it)."
        )
    if not first.records:
        sentences.append(
            f"{name}: speed and memory were not measured (no records.jsonl of this engine)."
        )
    if not first.evals:
        sentences.append(f"{name}: accuracy is not recorded in the engine directory.")
    if foreign:
        sentences.append(
            f"{name}: {foreign} records in its records.jsonl belong to another engine and are left"
            " out."
        )
    return sentences


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """One page over all runs at `out`, with Markdown and JSON beside it. Raises EdgemedError where
    `out` cannot be written.
    """
    title = f"Comparison: {', '.join(run.label for run in runs)}" if len(runs) > 1 else ""
    if out.suffix != ".html" or out.is_dir():
        raise EdgemedError(f"{out} is no name for a page", "Give --out FILE.html")
    if not out.parent.is_dir():
        raise EdgemedError(
            f"the directory of {out} does not exist", "Make it first, or choose another --out"
        )
    store.write_json(out.with_suffix(".json"), comparison(runs))
    report.write_whole(out.with_suffix(".md"), report.page(runs, title, "report.md.j2"))
    return report.write_whole(out, report.page(runs, title))


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """All documents of a comparison as one JSON value."""
    return {
        "schema": SCHEMA,
        "comparison": [{"label": run.label, "document": run.document} for run in runs],
    }
