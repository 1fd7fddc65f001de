"""What a report shows, worked out from run documents: pure functions, nothing is measured or loaded
here.

One run and a comparison of several take the same way, so that they cannot tell different stories;
the templates only lay out what is decided here: which numbers may be shown, which may stand side by
side, and which is best.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemed.artifacts import lineage
from edgemed.documents.bench import BenchRecord
from edgemed.documents.machine import Machine
from edgemed.documents.run import EngineEntry, RunDocument
from edgemed.documents.verify import VerifyResult
from edgemed.formatting import number, points, pretty, size
from edgemed.reporting import recommendation, verdicts
from edgemed.reporting.recommendation import fastest

Json = Mapping[str, Any]
LONG = 160  # letters of a note that is unfolded instead of standing in a table
# Shown in columns of their own; a record of any other name goes into the table of further
# measurements.
NAMED = {
    "load_seconds",
    "first_token_seconds",
    "prefill_tokens_per_second",
    "step_milliseconds",
    "decode_tokens_per_second",
    "peak_memory_bytes",
    "file_bytes",
    "bandwidth_gb_s",
    "ceiling_tokens_per_second",
    "ceiling_share",
}
# Of a question about an image, in the order of its table.
IMAGE = {
    "image_preprocess_seconds": "Preparing",
    "image_tower_seconds": "Tower",
    "image_projector_seconds": "Projector",
    "image_prefill_seconds": "Prompt reading",
    "image_first_token_seconds": "First token",
    "image_second_question_seconds": "Second question",
    "image_load_seconds": "Loading the tower",
}


@dataclass(frozen=True)
class Run:
    """One document on a page. document: as it was read, and as it is written again; label: its name
    there, empty where it is the only one.
    """

    document: Json
    label: str = ""

    @functools.cached_property
    def data(self) -> RunDocument:
        """The document as typed values. Raises EdgemedError where it lacks a part."""
        where = f"the run document of {self.label}" if self.label else "the run document"
        return RunDocument.from_json(self.document, where)


def view(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the templates show, but for the accuracy tables and the charts."""
    evaluated = {result.model_key for run in runs for result in run.data.source_evals}
    engines = [engine_view(engine, run, evaluated) for run in runs for engine in run.data.engines]
    source_keys = list(dict.fromkeys(engine["source_key"] for engine in engines))
    for number_, engine in enumerate(engines, 1):
        engine["number"] = number_
        if len(source_keys) > 1:
            engine["source"] = letter(source_keys.index(engine["source_key"]))
    machines = list(dict.fromkeys(engine["machine"] for engine in engines if engine["machine"]))
    groups = [
        {"name": name, "engines": [e for e in engines if e["machine"] == name]} for name in machines
    ]
    for group in groups:
        scale_bars(group["engines"])
    mark_best(engines)
    rows = [
        {"engine": engine, "answers": verdicts.answers(engine, engine["run"].data)}
        for engine in engines
    ]
    return {
        "several": len(runs) > 1,
        "runs": [run_view(run) for run in runs],
        "engines": engines,
        "machines": groups,
        "first_machine": machines[0] if machines else None,
        "sources": [
            {
                "letter": letter(i),
                "key": key,
                "engines": [e["label"] for e in engines if e["source_key"] == key],
            }
            for i, key in enumerate(source_keys)
        ],
        "summary": rows,
        "conclusion": verdicts.conclusion(rows),
        "ship": recommendation.recommend(rows, len(source_keys) <= 1),
        "warnings": recommendation.warnings(engines, [run.data for run in runs]),
        "headline": headline(engines, len(machines) == 1, len(source_keys) == 1),
        "random_weights": any(run.data.source.random_weights for run in runs),
        "not_measured": [
            (run.label, sentence) for run in runs for sentence in run.data.not_measured
        ],
        "image_columns": IMAGE,
        "targets": list(dict.fromkeys(target_name(run.data) for run in runs)),
    }


def letter(number_: int) -> str:
    """A, B, C ... of a source, where there are several."""
    return chr(ord("A") + number_)


def run_view(run: Run) -> dict[str, Any]:
    """One document: what went in, what was done, on what, with which versions."""
    document = run.data
    recipe = None
    if document.recipe:
        recipe = json.dumps(document.recipe, indent=1, ensure_ascii=False)
    return {
        "label": run.label,
        "d": document,
        "steps": [
            {
                "stage": manifest.stage,
                "wall_seconds": manifest.wall_seconds,
                "peak_memory_bytes": manifest.peak_memory_bytes,
                "notes": named_values(manifest.notes),
                "settings": named_values(manifest.params),
            }
            for manifest in document.steps
        ],
        "tree": lineage.tree(run.document),
        "recipe": recipe,
        "versions": versions(document),
        "engines": [
            {
                "name": engine.name,
                "target": engine.target,
                "precision": engine.precision,
                "manifest": engine.manifest,
                "notes": named_values(engine.manifest.notes),
            }
            for engine in document.engines
        ],
    }


def target_name(document: RunDocument) -> str:
    device = document.device
    return device.title if device and device.recognise else "the machine it ran on"


def engine_view(engine: EngineEntry, run: Run, evaluated: set[str]) -> dict[str, Any]:
    """One engine: the verdict on its parity, and its numbers by name where they may be shown."""
    verdict = verdict_of(engine)
    records = () if verdict == "failed" else engine.records
    # Numbers that depend on the length of the prompt stand in a table of their own.
    values = {
        record.name: record
        for record in records
        if record.how.get("prompt") is None or "generate" in record.how
    }
    prompts = prompt_rows(records)
    verify = engine.verify
    machine = records[-1].machine if records else None
    device = run.data.device
    return {
        "name": engine.name,
        "target": engine.target,
        "precision": engine.precision,
        "bytes": engine.bytes,
        "manifest": engine.manifest,
        "verify": verify,
        "evals": engine.evals,
        "gate": engine.gate,
        "stages": engine.stages,
        "run": run,
        "source": "",
        "label": f"{run.label}: {engine.name}" if run.label else engine.name,
        "verdict": verdict,
        "values": values,
        "prompts": prompts,
        "last": prompts[-1] if prompts else None,
        "why_no_speed": None if records else silence(engine, verdict),
        "greedy": greedy_share(verify),
        "machine": machine_name(machine) if machine else None,
        "source_key": lineage.source_of(engine.manifest.to_json(), evaluated),
        # Several strategies on one task: the first, which is the one the gate judges, stands for
        # it.
        "results": {result.task_key: result for result in reversed(engine.evals)},
        "best": set(),
        "bars": {},
        "further": [record for record in records if record.name not in (*NAMED, *IMAGE)],
        "image": {name: values[name] for name in IMAGE if name in values},
        "cached": fits_the_cache(values.get("ceiling_tokens_per_second")),
        "room": verdicts.usable_bytes(device, machine)
        if machine and verdicts.shares_memory(device)
        else None,
    }


def prompt_rows(records: Sequence[BenchRecord]) -> list[dict[str, Any]]:
    """One row per prompt length: the length, and its records by name."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.name == "first_token_seconds":
            rows[record.how["prompt"]] = {"prompt": record.how["prompt"]}
    for record in records:
        row = rows.get(record.how.get("prompt", -1))
        if row is not None and "generate" not in record.how:
            row[record.name] = record
    return [rows[length] for length in sorted(rows)]


def greedy_share(verify: VerifyResult | None) -> float | None:
    """Share of greedy tokens that are the source's, None for heads that do not generate."""
    if verify is None or not verify.greedy_tokens or verify.greedy_same is None:
        return None
    return verify.greedy_same / verify.greedy_tokens


def fits_the_cache(ceiling: BenchRecord | None) -> bool:
    """Weights that fit the cache are not read from memory for every token, so the memory's ceiling
    does not bound them.
    """
    if ceiling is None:
        return False
    weight_bytes: int = ceiling.how["bytes_per_token"]
    return weight_bytes < ceiling.machine.cache_bytes


def silence(engine: EngineEntry, verdict: str) -> str:
    """Why an engine shows no speed."""
    if verdict == "failed":
        return "not benchmarked: parity failed"
    unbuilt = engine.manifest.notes.get("unbuilt")
    if unbuilt:
        return f"unbuilt, not benchmarked; parity is that of {unbuilt}"
    return "not benchmarked"


def machine_name(machine: Machine) -> str:
    """Speeds stand side by side only where this agrees: a Jetson's power mode alone makes a factor
    of 1.6.
    """
    if machine.power_mode:
        return f"{machine.label} ({machine.power_mode})"
    return machine.label


def verdict_of(engine: EngineEntry) -> str:
    if engine.verify is None:
        return "not verified"
    return "passed" if engine.verify.passed else "failed"


def value(engine: Json, name: str) -> float | None:
    record: BenchRecord | None = engine["values"].get(name)
    return record.value if record else None


def mark_best(engines: Sequence[dict[str, Any]]) -> None:
    """The smallest, leanest and fastest among engines that may be deployed, where they differ: of
    one source, and for speed and memory on one machine.
    """
    sound = [engine for engine in engines if engine["verdict"] != "failed"]
    for name, choose in (
        ("bytes", min),
        ("peak_memory_bytes", min),
        ("decode_tokens_per_second", max),
    ):
        groups: dict[tuple[str, str | None], list[tuple[dict[str, Any], float]]] = {}
        for engine in sound:
            figure = engine["bytes"] if name == "bytes" else value(engine, name)
            machine = None if name == "bytes" else engine["machine"]
            if figure is not None:
                groups.setdefault((engine["source_key"], machine), []).append((engine, figure))
        for rivals in groups.values():
            if name == "decode_tokens_per_second":
                winner = fastest([engine for engine, _ in rivals]).engine
                if winner is not None and len(rivals) > 1:
                    winner["best"].add(name)
                continue
            figures = {figure for _, figure in rivals}
            if len(figures) == 1:
                continue
            for engine, figure in rivals:
                if figure == choose(figures):
                    engine["best"].add(name)


def scale_bars(engines: Sequence[dict[str, Any]]) -> None:
    """Decoding speed within its ceiling, in percent of the longest bar on this machine."""
    names = ("ceiling_tokens_per_second", "decode_tokens_per_second")
    longest = max((value(e, name) or 0 for e in engines for name in names), default=0)
    for engine in engines:
        engine["bars"] = {
            name: 100 * (value(engine, name) or 0) / longest if longest else 0 for name in names
        }


@dataclass(frozen=True)
class Headline:
    """One of the few figures a reader wants first. bad: whether it is bad news."""

    label: str
    figure: str
    note: str
    bad: bool = False


def headline(engines: Sequence[Json], one_machine: bool, one_source: bool) -> list[Headline]:
    """The few figures a reader wants first."""
    sound = [engine for engine in engines if engine["verdict"] != "failed"]
    figures = [parity_headline(engines)]
    if one_machine and one_source:
        first = fastest(sound)
        if first.engine is not None:
            speed = first.engine["values"]["decode_tokens_per_second"].value
            figures.append(
                Headline("Fastest engine", f"{number(speed)}\u00a0tok/s", first.engine["label"])
            )
        elif first.why:
            figures.append(Headline("Fastest engine", "not known", first.why, True))
    if sound and one_source:
        small = min(sound, key=lambda engine: engine["bytes"])
        figures.append(Headline("Smallest engine", size(small["bytes"]), small["label"]))
    loss = loss_headline(sound)
    if loss:
        figures.append(loss)
    return figures


def parity_headline(engines: Sequence[Json]) -> Headline:
    checked = [engine for engine in engines if engine["verify"] is not None]
    failed = [engine["label"] for engine in checked if engine["verdict"] == "failed"]
    label = "Parity with the source"
    if not checked:
        return Headline(label, "none verified", "no engine was compared with its source")
    note = f"failed: {', '.join(failed)}" if failed else "engines passed"
    return Headline(label, f"{len(checked) - len(failed)} of {len(checked)}", note, bool(failed))


def loss_headline(engines: Sequence[Json]) -> Headline | None:
    """The largest loss of accuracy of an engine, None where nothing was paired."""
    paired = [
        (result.paired.difference.value, engine["label"], result)
        for engine in engines
        for result in engine["evals"]
        if result.paired
    ]
    if not paired:
        return None
    worst, name, result = min(paired, key=lambda row: row[0])
    if worst >= 0:
        note = f"{len(paired)} comparisons with the source"
        return Headline("Largest loss of accuracy", "none", note)
    note = f"{name} on {result.title}, {result.strategy}, {result.n} items"
    return Headline("Largest loss of accuracy", points(worst), note)


def named_values(notes: Json) -> dict[str, list[tuple[str, str]]]:
    """Notes of a manifest as (name, text): 'short' ones for a table, 'long' ones (a value per
    layer, say) to be unfolded.
    """
    texts: dict[str, list[tuple[str, str]]] = {"short": [], "long": []}
    for name, item in notes.items():
        label = name.replace("_", " ")
        if isinstance(item, (dict, list)) and len(json.dumps(item)) > LONG:
            texts["long"].append((label, json.dumps(item, indent=1, ensure_ascii=False)))
        else:
            texts["short"].append((label, pretty(item)))
    return texts


def versions(document: RunDocument) -> list[tuple[str, str]]:
    """Every package version any part was made or measured with; more than one of a package is a
    thing to see.
    """
    sources = [manifest.versions for manifest in document.steps]
    sources += [engine.manifest.versions for engine in document.engines]
    for engine in document.engines:
        sources += [record.versions for record in engine.records]
    by_package: dict[str, dict[str, None]] = {}
    for source in sources:
        for package, version in source.items():
            by_package.setdefault(package, {})[version] = None
    return [(package, ", ".join(known)) for package, known in by_package.items()]
