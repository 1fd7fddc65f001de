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
from edgemed.artifacts.json_files import read_json_object
from edgemed.artifacts.records import read_records
from edgemed.engines.engine import ENGINE
from edgemed.errors import EdgemedError
from edgemed.reporting import report
from edgemed.reporting.view_model import Run, machine_name

Json = Mapping[str, Any]
FIX = "Give directories made by edgemed run or edgemed export"
AGAIN = "Run the recipe again"


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
        found = ["/".join(p[-depth:]).lstrip("/") for p in parts]
        if len(set(found)) == len(found):
            break
    return found


def read_document(directory: Path) -> Json:
    """The run document of a run directory, or one made from an engine directory."""
    if not directory.is_dir():
        raise EdgemedError(f"{directory} is not a directory", FIX)
    file = directory / "report.json"
    if file.is_file():
        document = read_json_object(file, AGAIN)
        report.check(document, str(directory))
        return document
    if (directory / store.MANIFEST).is_file():
        return engine_document(directory)
    raise EdgemedError(f"{directory} has no report.json and no {store.MANIFEST}", FIX)


def engine_document(directory: Path) -> dict[str, Any]:
    """A run document of one engine, from its manifest, engine.json and records. Raises EdgemedError
    where it is no engine.
    """
    manifest = store.read_manifest(directory)
    if manifest["kind"] != "engine" or not (directory / ENGINE).is_file():
        raise EdgemedError(f"{directory} is a {manifest['kind']}, not a run or an engine", FIX)
    facts = read_json_object(directory / ENGINE, AGAIN)
    records = read_records(directory)
    own = [record for record in records if record["engine_key"] == manifest["key"]]
    machines = list(dict.fromkeys(machine_name(record["machine"]) for record in own)) or [None]
    evals = manifest.get("evals") or []
    engines = []
    for machine in machines:
        # Speeds of two machines are two rows; what the engine answers is the same on both and
        # stands in the first.
        first = machine == machines[0]
        engines.append(
            {
                "name": facts["name"] if len(machines) == 1 else f"{facts['name']} on {machine}",
                "target": facts["target"],
                "precision": facts["precision"],
                "path": str(directory),
                "bytes": store.size_of(manifest),
                "manifest": manifest,
                "verify": manifest.get("verify"),
                "records": latest(
                    [record for record in own if machine_name(record["machine"]) == machine]
                ),
                "evals": evals if first else [],
                "gate": manifest.get("gate") if first else None,
                "stages": (manifest.get("verify") or {}).get("stages", []),
            }
        )
    return {
        "schema": report.SCHEMA,
        "title": facts["name"],
        "created": manifest["created"],
        "recipe": {},
        "device": None,
        "machine": own[-1]["machine"] if own else None,
        "source": origin(manifest, facts),
        "steps": [m for _, m in lineage.ancestors(manifest)][:0:-1],
        "engines": engines,
        "source_evals": [],
        "strategies": list(dict.fromkeys(result["strategy"] for result in evals)),
        "gate": None,
        "not_measured": missing(facts["name"], engines, len(records) - len(own)),
    }


def origin(manifest: Json, facts: Json) -> dict[str, Any]:
    """What is known of the checkpoint everything began with: its files, and its name where the
    engine carries it.
    """
    *_, (_, oldest) = lineage.ancestors(manifest)
    return {
        "path": (manifest.get("source") or {}).get("name"),
        "family": facts["family"],
        "parameters": None,
        "files": lineage.read(oldest),
        "random_weights": facts["random_weights"],
    }


def latest(records: Sequence[Json]) -> list[Json]:
    """The newest record of each number, of the last thread count used; records are only ever
    appended.
    """
    threads = records[-1]["how"].get("threads") if records else None
    kept = {}
    for record in records:
        if record["how"].get("threads") == threads:
            kept[record["name"], record["how"].get("prompt"), record["how"].get("generate")] = (
                record
            )
    return list(kept.values())


def missing(name: str, engines: Sequence[Json], foreign: int) -> list[str]:
    """What a reader of a lone engine's page might take for granted."""
    first = engines[0]
    found = (
        []
        if first["verify"]
        else [
            f"{name}: whether it answers as its source does is not recorded in the engine directory"
            " (edgemed verify checks it)."
        ]
    )
    found += (
        []
        if first["records"]
        else [f"{name}: speed and memory were not measured (no records.jsonl of this engine)."]
    )
    found += (
        [] if first["evals"] else [f"{name}: accuracy is not recorded in the engine directory."]
    )
    if foreign:
        found += [
            f"{name}: {foreign} records in its records.jsonl belong to another engine and are left"
            " out."
        ]
    return found


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
    report.put(out.with_suffix(".md"), report.page(runs, title, "report.md.j2"))
    return report.put(out, report.page(runs, title))


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """All documents of a comparison as one JSON value."""
    return {
        "schema": report.SCHEMA,
        "comparison": [{"label": run.label, "document": run.document} for run in runs],
    }
