"""What a report shows, worked out from run documents as plain mappings: pure functions, nothing is
measured or loaded here.

One run and a comparison of several take the same way, so that they cannot tell different stories;
the templates only lay out what is decided here: which numbers may be shown, which may stand side by
side, and which is best.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemed.artifacts import lineage
from edgemed.formatting import number, points, pretty, size
from edgemed.reporting import verdicts

Json = Mapping[str, Any]
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
    """One document on a page. label: its name there, empty where it is the only one."""

    document: Json
    label: str = ""


def view(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the templates show, but for the accuracy tables and the charts."""
    known = {result["model_key"] for run in runs for result in run.document["source_evals"]}
    engines = [
        engine_view(engine, run, known) for run in runs for engine in run.document["engines"]
    ]
    several = sorted(
        {engine["source_key"] for engine in engines}, key=[e["source_key"] for e in engines].index
    )
    for i, engine in enumerate(engines):
        engine["number"] = i + 1
        engine["source"] = (
            chr(ord("A") + several.index(engine["source_key"])) if len(several) > 1 else ""
        )
    machines = list(dict.fromkeys(engine["machine"] for engine in engines if engine["machine"]))
    groups = [
        {"name": name, "engines": [e for e in engines if e["machine"] == name]} for name in machines
    ]
    for group in groups:
        scale_bars(group["engines"])
    mark_best(engines)
    rows = [
        {"engine": engine, "answers": verdicts.answers(engine, engine["run"].document)}
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
                "letter": chr(ord("A") + i),
                "key": key,
                "engines": [e["label"] for e in engines if e["source_key"] == key],
            }
            for i, key in enumerate(several)
        ],
        "summary": rows,
        "conclusion": verdicts.conclusion(rows),
        "headline": headline(engines, len(machines) == 1, len(several) == 1),
        "random_weights": any(run.document["source"]["random_weights"] for run in runs),
        "not_measured": [
            (run.label, sentence) for run in runs for sentence in run.document["not_measured"]
        ],
        "image_columns": IMAGE,
        "targets": list(dict.fromkeys(target_name(run.document) for run in runs)),
    }


def run_view(run: Run) -> dict[str, Any]:
    """One document: what went in, what was done, on what, with which versions."""
    d = run.document
    return {
        "label": run.label,
        "d": d,
        "steps": [
            {**m, "facts": facts(m["notes"]), "settings": facts(m["params"])} for m in d["steps"]
        ],
        "tree": lineage.tree(d),
        "recipe": json.dumps(d["recipe"], indent=1, ensure_ascii=False) if d["recipe"] else None,
        "versions": versions(d),
        "engines": [
            {
                "name": e["name"],
                "target": e["target"],
                "precision": e["precision"],
                "manifest": e["manifest"],
                "facts": facts(e["manifest"]["notes"]),
            }
            for e in d["engines"]
        ],
    }


def target_name(document: Json) -> str:
    device = document["device"]
    return device["title"] if device and device["recognise"] else "the machine it ran on"


def engine_view(engine: Json, run: Run, known: set[str]) -> dict[str, Any]:
    """One engine: the verdict on its parity, and its numbers by name where they may be shown."""
    verdict = verdict_of(engine)
    records = [] if verdict == "failed" else engine["records"]
    values = {
        record["name"]: record
        for record in records
        if record["how"].get("prompt") is None or "generate" in record["how"]
    }
    prompts = sorted({r["how"]["prompt"] for r in records if r["name"] == "first_token_seconds"})
    by_prompt = [
        {
            "prompt": p,
            **{
                r["name"]: r
                for r in records
                if r["how"].get("prompt") == p and "generate" not in r["how"]
            },
        }
        for p in prompts
    ]
    verify = engine["verify"]
    ceiling = values.get("ceiling_tokens_per_second")
    return {
        **engine,
        "run": run,
        "label": f"{run.label}: {engine['name']}" if run.label else engine["name"],
        "verdict": verdict,
        "values": values,
        "prompts": by_prompt,
        "last": by_prompt[-1] if by_prompt else None,
        "why_no_speed": None if records else silence(engine, verdict),
        "greedy": verify["greedy_same"] / verify["greedy_tokens"]
        if verify and verify.get("greedy_tokens")
        else None,
        "machine": machine_name(records[-1]["machine"]) if records else None,
        "source_key": lineage.source_of(engine["manifest"], known),
        # Several strategies on one task: the first, which is the one the gate judges, stands for
        # it.
        "results": {result["task_key"]: result for result in reversed(engine["evals"])},
        "best": set(),
        "bars": {},
        "further": [record for record in records if record["name"] not in (*NAMED, *IMAGE)],
        "image": {name: values[name] for name in IMAGE if name in values},
        # Weights that fit the cache are not read from memory for every token, so the memory's
        # ceiling does not bound them.
        "cached": ceiling is not None
        and ceiling["how"]["bytes_per_token"] < ceiling["machine"].get("cache_bytes", 0),
        "room": verdicts.usable_bytes(run.document["device"], records[-1]["machine"])
        if records and verdicts.shares_memory(run.document["device"])
        else None,
    }


def silence(engine: Json, verdict: str) -> str:
    """Why an engine shows no speed."""
    if verdict == "failed":
        return "not benchmarked: parity failed"
    unbuilt = engine["manifest"]["notes"].get("unbuilt")
    return (
        f"unbuilt, not benchmarked; parity is that of {unbuilt}" if unbuilt else "not benchmarked"
    )


def machine_name(machine: Json) -> str:
    """Speeds stand side by side only where this agrees: a Jetson's power mode alone makes a factor
    of 1.6.
    """
    return (
        f"{machine['label']} ({machine['power_mode']})"
        if machine["power_mode"]
        else machine["label"]
    )


def verdict_of(engine: Json) -> str:
    if engine["verify"] is None:
        return "not verified"
    return "passed" if engine["verify"]["passed"] else "failed"


def value(engine: Json, name: str) -> float | None:
    record = engine["values"].get(name)
    return record["value"] if record else None


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
        rivals: dict[tuple[str, str | None], list[tuple[dict[str, Any], float]]] = {}
        for engine in sound:
            figure = engine["bytes"] if name == "bytes" else value(engine, name)
            if figure is not None:
                rivals.setdefault(
                    (engine["source_key"], None if name == "bytes" else engine["machine"]), []
                ).append((engine, figure))
        for found in rivals.values():
            known = {figure for _, figure in found}
            for engine, figure in found:
                if len(known) > 1 and figure == choose(known):
                    engine["best"].add(name)


def scale_bars(engines: Sequence[dict[str, Any]]) -> None:
    """Decoding speed within its ceiling, in percent of the longest bar on this machine."""
    names = ("ceiling_tokens_per_second", "decode_tokens_per_second")
    longest = max((value(e, name) or 0 for e in engines for name in names), default=0)
    for engine in engines:
        engine["bars"] = {
            name: 100 * (value(engine, name) or 0) / longest if longest else 0 for name in names
        }


def headline(engines: Sequence[Json], one_machine: bool, one_source: bool) -> list[dict[str, Any]]:
    """The few facts a reader wants first: label, figure, note, and whether it is bad news."""
    checked = [e for e in engines if e["verify"] is not None]
    sound = [e for e in engines if e["verdict"] != "failed"]
    failed = [e["label"] for e in checked if e["verdict"] == "failed"]
    note = (
        f"failed: {', '.join(failed)}"
        if failed
        else "engines passed"
        if checked
        else "no engine was compared with its source"
    )
    found = [
        (
            "Parity with the source",
            f"{len(checked) - len(failed)} of {len(checked)}" if checked else "none verified",
            note,
            bool(failed),
        )
    ]
    fast = [e for e in sound if "decode_tokens_per_second" in e["values"]]
    if fast and one_machine and one_source:
        first = max(fast, key=lambda e: value(e, "decode_tokens_per_second"))
        found.append(
            (
                "Fastest engine",
                f"{number(value(first, 'decode_tokens_per_second'))}\u00a0tok/s",
                first["label"],
                False,
            )
        )
    if sound and one_source:
        small = min(sound, key=lambda e: e["bytes"])
        found.append(("Smallest engine", size(small["bytes"]), small["label"], False))
    paired = [
        (r["paired"]["difference"]["value"], e["label"], r)
        for e in sound
        for r in e["evals"]
        if r["paired"]
    ]
    if paired:
        worst, name, result = min(paired, key=lambda row: row[0])
        note = (
            f"{name} on {result['task']}, {result['strategy']}, {result['n']} items"
            if worst < 0
            else f"{len(paired)} comparisons with the source"
        )
        found.append(
            ("Largest loss of accuracy", points(worst) if worst < 0 else "none", note, False)
        )
    return [dict(zip(("label", "figure", "note", "bad"), fact, strict=True)) for fact in found]


def facts(notes: Json) -> dict[str, list[tuple[str, str]]]:
    """Notes of a manifest as (name, text): 'short' ones for a table, 'long' ones (a value per
    layer, say) to be unfolded.
    """
    found: dict[str, list[tuple[str, str]]] = {"short": [], "long": []}
    for name, item in notes.items():
        label = name.replace("_", " ")
        if isinstance(item, (dict, list)) and len(json.dumps(item)) > 160:
            found["long"].append((label, json.dumps(item, indent=1, ensure_ascii=False)))
        else:
            found["short"].append((label, pretty(item)))
    return found


def versions(document: Json) -> list[tuple[str, str]]:
    """Every package version any part was made or measured with; more than one of a package is a
    thing to see.
    """
    found: dict[str, dict[str, None]] = {}
    manifests = [
        *document["steps"],
        *(e["manifest"] for e in document["engines"]),
        *(r for e in document["engines"] for r in e["records"]),
    ]
    for manifest in manifests:
        for package, version in manifest["versions"].items():
            found.setdefault(package, {})[version] = None
    return [(package, ", ".join(seen)) for package, seen in found.items()]
