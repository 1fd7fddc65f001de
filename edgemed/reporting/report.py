"""Turns run documents into one page a person reads offline, and its Markdown twin: pure functions,
nothing is measured or loaded here.

The page holds everything itself (no script, no font, no request), so that it can travel with an
engine, be printed and be read years later. Numbers stay with the condition they were measured
under, and what failed its check shows no speed at all.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed import formatting
from edgemed.artifacts.json_files import write_text
from edgemed.documents.bench import BenchRecord
from edgemed.documents.machine import TargetDevice
from edgemed.documents.run import SCHEMA, RunDocument
from edgemed.errors import EdgemedError
from edgemed.reporting import accuracy_section, charts
from edgemed.reporting.charts import Distribution
from edgemed.reporting.view_model import Run, value, view

TEMPLATES = Path(__file__).parent / "templates"
NEEDED = (
    "title",
    "created",
    "recipe",
    "device",
    "machine",
    "source",
    "steps",
    "engines",
    "source_evals",
    "strategies",
    "gate",
    "not_measured",
)
FILTERS = (
    "size",
    "seconds",
    "number",
    "count",
    "percent",
    "percent_interval",
    "points",
    "point_interval",
    "probability",
    "fixed",
    "tiny",
    "pretty",
    "unit_of",
    "moment",
)
Json = Mapping[str, Any]


def render(document: Json) -> str:
    """The report page of a run document, as HTML text. Raises EdgemedError for a document of
    another schema.
    """
    return page([Run(document)])


def markdown(document: Json) -> str:
    """The same report as Markdown: every table, no charts. Raises EdgemedError for a document of
    another schema.
    """
    return page([Run(document)], template="report.md.j2")


def write(document: Json, folder: Path) -> Path:
    """report.html and report.md into `folder`, each whole or not at all; returns the page's
    path.
    """
    write_whole(folder / "report.md", markdown(document))
    return write_whole(folder / "report.html", render(document))


def write_whole(file: Path, content: str) -> Path:
    write_text(file, content)
    return file


def page(runs: Sequence[Run], title: str = "", template: str = "report.html.j2") -> str:
    """One page over one or several runs. title: empty for that of the first. Raises EdgemedError
    for a document of another schema.
    """
    for run in runs:
        check(run.document, run.label)
    content = view(runs)
    tasks = accuracy_section.tasks(runs, content["engines"])
    context = {
        **content,
        "title": title or runs[0].data.title,
        "tasks": tasks,
        "costs": accuracy_section.costs(tasks),
        "speed": [speed_charts(group) for group in content["machines"]],
    }
    return templates().get_template(template).render(context)


@functools.cache
def templates() -> Any:
    import jinja2

    # Markdown is escaped by its own filter; HTML escaping there would show as entities.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in FILTERS:
        environment.filters[name] = getattr(formatting, name)
    environment.filters["cell"] = cell
    return environment


def check(document: Json, label: str = "") -> None:
    """Raises EdgemedError for a document of another schema, one that lacks a part, and one with a
    value of another type.
    """
    name = f"the run document of {label}" if label else "the run document"
    if not isinstance(document, Mapping) or "schema" not in document:
        raise EdgemedError(
            f"{name} is no report of edgemed", "Give a directory made by edgemed run"
        )
    if document["schema"] != SCHEMA:
        raise EdgemedError(
            f"{name} has schema {document['schema']}, this edgemed reads {SCHEMA}",
            "Run the recipe again",
        )
    if missing := [key for key in NEEDED if key not in document]:
        raise EdgemedError(f"{name} lacks {', '.join(missing)}", "Run the recipe again")
    RunDocument.from_json(document, name)


def speed_charts(group: Json) -> dict[str, Any]:
    """Charts of speed and memory of the engines measured on one machine."""
    engines = group["engines"]
    machine = group["name"]
    return {
        **group,
        "steps": steps(engines, machine),
        "first": first_tokens(engines, machine),
        "memory": memory(engines, machine),
    }


def memory(engines: Sequence[Json], machine: str) -> str:
    limits = {limit_name(e): e["room"] for e in engines if e["room"]}
    return charts.memory(
        [(e["label"], e["bytes"], value(e, "peak_memory_bytes")) for e in engines],
        limits,
        f"Memory of each engine on {machine} against what the device leaves",
    )


def limit_name(engine: Json) -> str:
    device: TargetDevice | None = engine["run"].data.device
    name: str = device.name if device else engine["machine"]
    return name


def distribution(label: str, record: BenchRecord) -> Distribution:
    return Distribution(label, record.value, record.spread.to_json())


def steps(engines: Sequence[Json], machine: str) -> str | None:
    rows = [
        distribution(e["label"], e["values"]["step_milliseconds"])
        for e in engines
        if "step_milliseconds" in e["values"]
    ]
    return charts.spans(rows, f"Latency of one token on {machine}", 1e-3) if rows else None


def first_tokens(engines: Sequence[Json], machine: str) -> str | None:
    rows: list[Distribution] = []
    lengths = {row["prompt"] for engine in engines for row in engine["prompts"]}
    for length in sorted(lengths):
        rows.append(Distribution(f"prompt of {length} tokens"))
        for engine in engines:
            for row in engine["prompts"]:
                if row["prompt"] == length:
                    rows.append(distribution(engine["label"], row["first_token_seconds"]))
    return charts.spans(rows, f"Time to the first token on {machine}") if rows else None


def cell(content: Any) -> str:
    """Text that stays inside one cell of a Markdown table and is never taken for markup."""
    text = " ".join(str(content).split(" ")).replace("\n", " ")
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text
