"""The accuracy part of a report: every task with its rows, statistics, subgroups, calibration, and
what an answer costs.

Results stand under one task only where their task key agrees, that is the same items of the same
file in the same wording; what the statistics say was worked out when the results were paired, and
is only laid out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgemed.documents.evaluation import Calibration, EvalResult, Subgroup
from edgemed.documents.gate import EngineGate
from edgemed.formatting import fixed, number, percent, seconds
from edgemed.reporting import charts
from edgemed.reporting.charts import ChartRow, CostPoint
from edgemed.reporting.view_model import Run

Json = Mapping[str, Any]


def tasks(runs: Sequence[Run], engines: Sequence[Json]) -> list[dict[str, Any]]:
    """Every task that any source or engine was evaluated on, with rows, charts and tables. engines:
    views of the same runs, in order.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        rows += source_rows(run)
        for engine in engines:
            if engine["run"].label == run.label:
                rows += engine_rows(engine)
    by_key: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_key.setdefault(row["r"].task_key, []).append(row)
    titles = {key: group[0]["r"].title for key, group in by_key.items()}
    sections = []
    for key, group in by_key.items():
        title = titles[key]
        if list(titles.values()).count(title) > 1:
            # The same name with other items is another task: it says how many questions and which.
            title = f"{title} ({group[0]['r'].n} items, {key[:6]})"
        sections.append(task(title, key, distinct(group)))
    return sections


def source_rows(run: Run) -> list[dict[str, Any]]:
    label = f"{run.label}: source" if run.label else "source"
    return [
        {
            "label": label,
            "source": True,
            "engine": None,
            "failed": False,
            "r": result,
            "p": None,
            "judged": None,
            "verdict": None,
            "base": None,
            "c": calibration(result),
        }
        for result in run.data.source_evals
    ]


def engine_rows(engine: Json) -> list[dict[str, Any]]:
    """An engine's results, each with the gate's comparison it belongs to and its source's own
    result.
    """
    gate: EngineGate | None = engine["gate"]
    comparisons = {}
    if gate:
        comparisons = {(row.task, row.strategy): row for row in gate.comparisons}
    bases = {
        (result.task_key, result.strategy): result for result in engine["run"].data.source_evals
    }
    rows = []
    for result in engine["evals"]:
        judged = comparisons.get((result.title, result.strategy))
        base = bases.get((result.task_key, result.strategy)) if result.paired else None
        rows.append(
            {
                "label": engine["label"],
                "source": False,
                "engine": engine,
                "failed": engine["verdict"] == "failed",
                "r": result,
                "p": result.paired,
                "judged": judged,
                "verdict": judged.verdict if judged else None,
                "base": base,
                "c": calibration(result),
            }
        )
    return rows


def distinct(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without a source that several runs share: it would stand there twice with the same
    answers.
    """
    different = []
    seen = set()
    for row in rows:
        same = (row["r"].model_key, row["r"].strategy)
        if not (row["source"] and same in seen):
            different.append(row)
        seen.add(same)
    return different


def task(title: str, key: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One task: its rows by strategy, charts, calibration and subgroups."""
    first: EvalResult = rows[0]["r"]
    blocks = [
        {"strategy": strategy, "rows": [row for row in rows if row["r"].strategy == strategy]}
        for strategy in dict.fromkeys(row["r"].strategy for row in rows)
    ]
    margin = margin_of(rows)
    paired = any(row["p"] for row in rows)
    charted = chart_rows(blocks)
    difference_chart = None
    flip_chart = None
    if paired:
        difference_chart = charts.differences(
            charted, margin, f"Accuracy on {title} less the source's"
        )
        flip_chart = charts.flips(charted, f"Answers on {title} that changed against the source")
    calibrated = [row["c"] for row in rows if row["c"]]
    targets = [each.coverage.target for each in calibrated if each.coverage]
    return {
        "title": title,
        "key": key,
        "sha": first.task_sha256,
        "n": first.n,
        "majority": first.majority,
        "blocks": blocks,
        "paired": paired,
        "scoring": ", ".join(dict.fromkeys(row["r"].scoring for row in rows)),
        "margin": margin,
        "machines": list(dict.fromkeys(row["r"].machine for row in rows)),
        "accuracy_chart": charts.accuracy(
            charted, first.majority, f"Accuracy on {title} with 95 % intervals"
        ),
        "difference_chart": difference_chart,
        "flip_chart": flip_chart,
        "calibrated": bool(calibrated),
        "target": targets[0] if targets else None,
        "reliability": [reliability(block, title) for block in blocks],
        "subgroups": subgroups(blocks[0]["rows"]),
        "scores": list(first.scores or ()),
    }


def margin_of(rows: Sequence[Json]) -> float | None:
    """The margin that all comparisons were made with, None where they differ or there is none."""
    margins = {
        row["p"].noninferiority.margin for row in rows if row["p"] and row["p"].noninferiority
    }
    return margins.pop() if len(margins) == 1 else None


def chart_rows(blocks: Sequence[Json]) -> list[ChartRow]:
    """The rows of the charts, under a heading per strategy where there are several."""
    lines = []
    for block in blocks:
        if len(blocks) > 1:
            lines.append(ChartRow(block["strategy"]))
        for row in block["rows"]:
            lines.append(
                ChartRow(
                    row["label"],
                    row["r"],
                    row["source"],
                    row["failed"],
                    row["verdict"],
                )
            )
    return lines


def calibration(result: EvalResult | None) -> Calibration | None:
    """ECE, Brier, bins and coverage; None where answers came without scores."""
    if result is None or result.calibration is None or result.calibration.ece is None:
        return None
    return result.calibration


def reliability(block: Json, title: str) -> dict[str, Any]:
    """One small chart per engine: its confidence against how often it was right, over the
    source's.
    """
    drawings = []
    for row in block["rows"]:
        after: Calibration | None = row["c"]
        before = calibration(row["base"])
        if row["source"] or after is None or not after.bins:
            continue
        caption = f"ECE {fixed(after.ece)}"
        if before:
            caption = f"ECE {fixed(before.ece)} → {fixed(after.ece)}"
        drawing = charts.reliability(
            before.bins if before else None,
            after.bins,
            f"Reliability of {row['label']} on {title}, {block['strategy']}",
        )
        drawings.append({"label": row["label"], "caption": caption, "svg": drawing})
    return {"strategy": block["strategy"], "charts": drawings}


def subgroups(rows: Sequence[Json]) -> dict[str, Any] | None:
    """Accuracy by subgroup for every engine that was paired, and the worst subgroup of each; None
    where the task has no subgroups.
    """
    judged = [row for row in rows if row["p"] and row["p"].subgroups]
    if not judged:
        return None
    one_source = len({row["engine"]["source_key"] for row in judged}) == 1
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for column, row in enumerate(judged):
        worst = largest_loss(row)
        for group in row["p"].subgroups:
            name = (group.group, str(group.value))
            if name not in lines:
                lines[name] = {
                    "group": name[0],
                    "value": name[1],
                    "n": group.n,
                    "source": group.source if one_source else None,
                    "cells": [None] * len(judged),
                }
            is_worst = worst is not None and name == (worst.group, str(worst.value))
            lines[name]["cells"][column] = {**group.to_json(), "worst": is_worst}
    losses = []
    for row in judged:
        if worst := largest_loss(row):
            losses.append({"label": row["label"], **worst.to_json()})
    return {
        "engines": [row["label"] for row in judged],
        "rows": list(lines.values()),
        "worst": losses,
        "strategy": judged[0]["r"].strategy,
    }


def largest_loss(row: Json) -> Subgroup | None:
    """The subgroup an engine lost most in, None where it lost in none."""
    worst: Subgroup | None = row["p"].worst
    return worst if worst and worst.difference < 0 else None


COSTS = (
    ("seconds_per_question", "seconds per question"),
    ("joules_per_question", "joules per question"),
)


def costs(sections: Sequence[Json]) -> dict[str, Any]:
    """Accuracy against what an answer costs: one panel per task, machine, source and kind of cost.
    sections: the tasks.

    An engine that failed parity shows no speed, so it has no place here. Times of different
    machines never share a panel.
    """
    rows = []
    for section in sections:
        for block in section["blocks"]:
            for row in block["rows"]:
                if row["engine"] and not row["failed"]:
                    rows.append((section["title"], row))
    strategies = list(dict.fromkeys(row["r"].strategy for _, row in rows))
    panels: dict[tuple[str, str, str, str], list[tuple[Json, float]]] = {}
    for title, row in rows:
        for field, axis in COSTS:
            cost: float | None = getattr(row["r"], field)
            if cost is not None:
                place = (axis, title, row["engine"]["source"], row["r"].machine)
                panels.setdefault(place, []).append((row, cost))
    machines = {machine for *_, machine in panels}
    # Panels in seconds stand before those in joules.
    ranked = sorted(panels.items(), key=lambda item: item[0][0], reverse=True)
    drawn = []
    for (axis, title, source, machine), marks in ranked:
        words = [title]
        if source:
            words.append(f"source {source}")
        if len(machines) > 1:
            words.append(machine)
        drawn.append(cost_panel(", ".join(words), axis, marks, strategies))
    engines = {row["engine"]["number"]: row["label"] for _, row in rows}
    return {
        "panels": drawn,
        "engines": sorted(engines.items()),
        "strategies": [
            {"name": strategy, "key": charts.key(charts.SHAPES[i % len(charts.SHAPES)])}
            for i, strategy in enumerate(strategies)
        ],
        "machines": sorted(machines),
        "shapes_repeat": len(strategies) > len(charts.SHAPES),
    }


def cost_panel(
    name: str, axis: str, marks: Sequence[tuple[Json, float]], strategies: Sequence[str]
) -> dict[str, Any]:
    """One panel. marks: (row, cost) of every engine and strategy; axis: what the cost is."""
    best = front([(cost, row["r"].accuracy) for row, cost in marks])
    chart_points = []
    steps = []
    for (row, cost), on_front in zip(marks, best, strict=True):
        result: EvalResult = row["r"]
        cost_text = seconds(cost) if axis.startswith("seconds") else f"{number(cost)}\u00a0J"
        accuracy = percent(result.accuracy)
        chart_points.append(
            CostPoint(
                row["engine"]["number"],
                strategies.index(result.strategy),
                cost,
                result.accuracy,
                result.interval,
                on_front,
                f"{row['label']}, {result.strategy}: {accuracy}, {cost_text}",
            )
        )
        if on_front:
            step = {
                "label": row["label"],
                "strategy": result.strategy,
                "accuracy": result.accuracy,
                "cost": cost_text,
            }
            steps.append((cost, step))
    return {
        "title": name,
        "axis": axis,
        "front": [step for _, step in sorted(steps, key=lambda step: step[0])],
        "svg": charts.pareto(chart_points, axis, f"Accuracy on {name} against {axis}"),
    }


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, accuracy) is on the Pareto front: nothing costs no more and is no less
    accurate, and better in one of the two.
    """
    return [
        not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
        for cost, accuracy in points
    ]
