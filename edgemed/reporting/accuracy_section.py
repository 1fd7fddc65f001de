"""The accuracy part of a report: every task with its rows, statistics, subgroups, calibration, and
what an answer costs.

Results stand under one task only where their task key agrees, that is the same items of the same
file in the same wording; what the statistics say was worked out when the results were paired, and
is only laid out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgemed.formatting import fixed, number, percent, seconds
from edgemed.reporting import charts
from edgemed.reporting.charts import Point, Row
from edgemed.reporting.view_model import Run

Json = Mapping[str, Any]


def title_of(result: Json) -> str:
    """A task by name, and its language or part where only one was asked for."""
    asked = result["language"] or result.get("part")  # results of earlier versions name no part
    return f"{result['task']}/{asked}" if asked else result["task"]


def tasks(runs: Sequence[Run], engines: Sequence[Json]) -> list[dict[str, Any]]:
    """Every task that any source or engine was evaluated on, with rows, charts and tables. engines:
    views of the same runs, in order.
    """
    rows = [
        row
        for run in runs
        for row in (
            *source_rows(run),
            *(
                row
                for engine in engines
                if engine["run"].label == run.label
                for row in engine_rows(engine)
            ),
        )
    ]
    keys = list(dict.fromkeys(row["r"]["task_key"] for row in rows))
    titles = [
        title_of(next(row["r"] for row in rows if row["r"]["task_key"] == key)) for key in keys
    ]
    found = []
    for key, title in zip(keys, titles, strict=True):
        own = distinct(row for row in rows if row["r"]["task_key"] == key)
        first = own[0]["r"]
        # The same name with other items is another task: it says how many questions and which.
        other = f" ({first['n']} items, {key[:6]})" if titles.count(title) > 1 else ""
        found.append(task(title + other, key, own))
    return found


def source_rows(run: Run) -> list[dict[str, Any]]:
    label = f"{run.label}: source" if run.label else "source"
    return [
        {
            "label": label,
            "source": True,
            "engine": None,
            "failed": False,
            "r": r,
            "p": None,
            "judged": None,
            "verdict": None,
            "base": None,
            "c": calibration(r),
        }
        for r in run.document["source_evals"]
    ]


def engine_rows(engine: Json) -> list[dict[str, Any]]:
    """An engine's results, each with the gate's comparison it belongs to and its source's own
    result.
    """
    comparisons = {
        (c["task"], c["strategy"]): c for c in (engine.get("gate") or {}).get("comparisons", ())
    }
    bases = {(r["task_key"], r["strategy"]): r for r in engine["run"].document["source_evals"]}
    found = []
    for r in engine["evals"]:
        judged = comparisons.get((title_of(r), r["strategy"]))
        found.append(
            {
                "label": engine["label"],
                "source": False,
                "engine": engine,
                "failed": engine["verdict"] == "failed",
                "r": r,
                "p": r["paired"],
                "judged": judged,
                "verdict": judged["verdict"] if judged else None,
                "base": bases.get((r["task_key"], r["strategy"])) if r["paired"] else None,
                "c": calibration(r),
            }
        )
    return found


def distinct(rows: Any) -> list[dict[str, Any]]:
    """Without a source that several runs share: it would stand there twice with the same
    answers.
    """
    kept = []
    seen = set()
    for row in rows:
        same = (row["r"]["model_key"], row["r"]["strategy"])
        if not (row["source"] and same in seen):
            kept.append(row)
        seen.add(same)
    return kept


def task(title: str, key: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]["r"]
    strategies = list(dict.fromkeys(row["r"]["strategy"] for row in rows))
    blocks = [
        {"strategy": s, "rows": [row for row in rows if row["r"]["strategy"] == s]}
        for s in strategies
    ]
    margins = {
        row["p"]["noninferiority"]["margin"]
        for row in rows
        if row["p"] and row["p"].get("noninferiority")
    }
    margin = next(iter(margins)) if len(margins) == 1 else None
    covers = [row["c"]["coverage"] for row in rows if row["c"] and row["c"].get("coverage")]
    paired = any(row["p"] for row in rows)
    charted = chart_rows(blocks)
    return {
        "title": title,
        "key": key,
        "sha": first["task_sha256"],
        "n": first["n"],
        "majority": first["majority"],
        "blocks": blocks,
        "paired": paired,
        "scoring": ", ".join(dict.fromkeys(row["r"]["scoring"] for row in rows)),
        "margin": margin,
        "machines": list(dict.fromkeys(row["r"]["machine"] for row in rows)),
        "accuracy_chart": charts.accuracy(
            charted, first["majority"], f"Accuracy on {title} with 95 % intervals"
        ),
        "difference_chart": charts.differences(
            charted, margin, f"Accuracy on {title} less the source's"
        )
        if paired
        else None,
        "flip_chart": charts.flips(charted, f"Answers on {title} that changed against the source")
        if paired
        else None,
        "calibrated": any(row["c"] for row in rows),
        "target": covers[0]["target"] if covers else None,
        "reliability": [reliability(block, title) for block in blocks],
        "subgroups": subgroups(blocks[0]["rows"]),
        "scores": list(first.get("scores") or ()),
    }


def chart_rows(blocks: Sequence[Json]) -> list[Row]:
    """The rows of the charts, under a heading per strategy where there are several."""
    found = []
    for block in blocks:
        if len(blocks) > 1:
            found += [Row(block["strategy"])]
        found += [
            Row(
                row["label"],
                row["r"],
                row["source"],
                row["failed"],
                row["verdict"],
            )
            for row in block["rows"]
        ]
    return found


def calibration(result: Json | None) -> Json | None:
    """ECE, Brier, bins and coverage; None where answers came without scores."""
    found = result.get("calibration") if result else None
    return {"left_out": 0, **found} if found and found.get("ece") is not None else None


def reliability(block: Json, title: str) -> dict[str, Any]:
    """One small chart per engine: its confidence against how often it was right, over the
    source's.
    """
    drawings = []
    for row in block["rows"]:
        after = row["c"]
        before = calibration(row["base"])
        if row["source"] or not after or not after.get("bins"):
            continue
        caption = (
            f"ECE {fixed(before['ece'])} → {fixed(after['ece'])}"
            if before
            else f"ECE {fixed(after['ece'])}"
        )
        drawn = charts.reliability(
            before.get("bins") if before else None,
            after["bins"],
            f"Reliability of {row['label']} on {title}, {block['strategy']}",
        )
        drawings.append({"label": row["label"], "caption": caption, "svg": drawn})
    return {"strategy": block["strategy"], "charts": drawings}


def subgroups(rows: Sequence[Json]) -> dict[str, Any] | None:
    """Accuracy by subgroup for every engine that was paired, and the worst subgroup of each; None
    where the task has no subgroups.
    """
    judged = [row for row in rows if row["p"] and row["p"].get("subgroups")]
    if not judged:
        return None
    sources = {row["engine"]["source_key"] for row in judged}
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for column, row in enumerate(judged):
        worst = lost(row)
        for s in row["p"]["subgroups"]:
            at = (s["group"], str(s["value"]))
            source = s["source"] if len(sources) == 1 else None
            found = lines.setdefault(
                at,
                {
                    "group": at[0],
                    "value": at[1],
                    "n": s["n"],
                    "source": source,
                    "cells": [None] * len(judged),
                },
            )
            found["cells"][column] = {
                **s,
                "worst": worst is not None and at == (worst["group"], str(worst["value"])),
            }
    named = [{"label": row["label"], **worst} for row in judged if (worst := lost(row))]
    return {
        "engines": [row["label"] for row in judged],
        "rows": list(lines.values()),
        "worst": named,
        "strategy": judged[0]["r"]["strategy"],
    }


def lost(row: Json) -> Json | None:
    """The subgroup an engine lost most in, None where it lost in none."""
    worst = row["p"].get("worst")
    return worst if worst and worst["difference"] < 0 else None


def costs(found: Sequence[Json]) -> dict[str, Any]:
    """Accuracy against what an answer costs: one panel per task, machine, source and kind of cost.
    found: the tasks.

    An engine that failed parity shows no speed, so it has no place here. Times of different
    machines never share a panel.
    """
    rows = [
        (t, row)
        for t in found
        for block in t["blocks"]
        for row in block["rows"]
        if row["engine"] and not row["failed"]
    ]
    strategies = list(dict.fromkeys(row["r"]["strategy"] for _, row in rows))
    panels: dict[tuple[str, ...], list[tuple[Json, float]]] = {}
    for t, row in rows:
        r = row["r"]
        where = (t["title"], row["engine"]["source"], row["r"]["machine"])
        for field, axis in (
            ("seconds_per_question", "seconds per question"),
            ("joules_per_question", "joules per question"),
        ):
            if r.get(field) is not None:
                panels.setdefault((axis, *where), []).append((row, r[field]))
    machines = {machine for *_, machine in panels}
    drawn = []
    for (axis, title, source, machine), at in sorted(
        panels.items(), key=lambda item: item[0][0], reverse=True
    ):
        name = ", ".join(
            [
                title,
                *([f"source {source}"] if source else []),
                *([machine] if len(machines) > 1 else []),
            ]
        )
        drawn.append(cost_panel(name, axis, at, strategies))
    engines = {row["engine"]["number"]: row["label"] for _, row in rows}
    return {
        "panels": drawn,
        "engines": sorted(engines.items()),
        "strategies": [
            {"name": s, "key": charts.key(charts.SHAPES[i % len(charts.SHAPES)])}
            for i, s in enumerate(strategies)
        ],
        "machines": sorted(machines),
        "shapes_repeat": len(strategies) > len(charts.SHAPES),
    }


def cost_panel(
    name: str, axis: str, at: Sequence[tuple[Json, float]], strategies: Sequence[str]
) -> dict[str, Any]:
    best = front([(cost, row["r"]["accuracy"]) for row, cost in at])
    write = seconds if axis.startswith("seconds") else lambda joules: f"{number(joules)}\u00a0J"
    found = []
    steps = []
    for (row, cost), on in zip(at, best, strict=True):
        r = row["r"]
        words = f"{row['label']}, {r['strategy']}: {percent(r['accuracy'])}, {write(cost)}"
        found.append(
            Point(
                row["engine"]["number"],
                strategies.index(r["strategy"]),
                cost,
                r["accuracy"],
                tuple(r["interval"]),
                on,
                words,
            )
        )
        if on:
            steps += [
                (
                    cost,
                    {
                        "label": row["label"],
                        "strategy": r["strategy"],
                        "accuracy": r["accuracy"],
                        "cost": write(cost),
                    },
                )
            ]
    front_ = [step for _, step in sorted(steps, key=lambda step: step[0])]
    return {
        "title": name,
        "axis": axis,
        "front": front_,
        "svg": charts.pareto(found, axis, f"Accuracy on {name} against {axis}"),
    }


def front(found: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, accuracy) is on the Pareto front: nothing costs no more and is no less
    accurate, and better in one of the two.
    """
    return [
        not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in found)
        for cost, accuracy in found
    ]
