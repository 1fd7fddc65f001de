"""The charts of the report, each a function from plain numbers to one SVG drawing.

Every mark is told apart by its shape or a word as well as by its colour, and every number drawn
also stands in a table of the page. Charts of one task have the same rows at the same heights, so
that an engine can be followed from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgemed.documents.evaluation import Bin, EvalResult, Paired
from edgemed.formatting import percent, points, seconds, size
from edgemed.reporting import svg
from edgemed.reporting.svg import Scale, circle, cross, line, polygon, polyline, rect, text

Json = Mapping[str, Any]
WIDTH = 372
LEFT = 130
RIGHT = 312  # of a chart with a row per engine: labels end at LEFT, figures begin after RIGHT
ROW = 20
HEADING = 26
TOP = 26
NAMES = LEFT - 10  # where names of engines end; they begin at the chart's left border
SHAPES = ("circle", "square", "diamond", "triangle", "hexagon")
VERDICTS = {"pass": "not worse", "fail": "worse", "undecided": "undecided"}


@dataclass(frozen=True)
class ChartRow:
    """One line of a chart; a heading where `result` is None. verdict: the gate's, None where it
    judged nothing.
    """

    label: str
    result: EvalResult | None = None
    source: bool = False
    failed: bool = False
    verdict: str | None = None

    @property
    def paired(self) -> Paired | None:
        return self.result.paired if self.result else None


@dataclass(frozen=True)
class Distribution:
    """One distribution: its median, and whatever of the quantiles (keys as in a record's spread) is
    known. label None: a heading.
    """

    label: str
    median: float | None = None
    spread: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CostPoint:
    """One engine with one strategy: cost per question, accuracy in 0..1 with its interval, and
    whether nothing cheaper is as accurate.
    """

    engine: int
    strategy: int
    cost: float
    accuracy: float
    interval: tuple[float, float]
    front: bool
    title: str


def accuracy(rows: Sequence[ChartRow], majority: float | None, title: str) -> str:
    """Accuracies with their Wilson intervals, and the accuracy of always giving the most frequent
    answer.
    """
    bounds = [bound for row in rows if row.result for bound in row.result.interval]
    if majority is not None:
        bounds.append(majority)
    low = max(0.0, min(bounds) - 0.02)
    high = min(1.0, max(bounds) + 0.02)
    scale = Scale(
        low,
        high,
        LEFT,
        RIGHT,
    )
    parts = []
    placed, bottom = place(rows)
    parts += grid(scale, svg.ticks(low, high, 4), bottom, lambda v: f"{100 * v:.0f}")
    if majority is not None:
        parts += marked(
            scale(majority), bottom, f"most frequent answer {100 * majority:.1f}", "mark"
        )
    base = None
    for i, (row, y) in enumerate(placed):
        result = row.result
        if result is None:
            continue
        x = scale(result.accuracy)
        base = (x, y) if row.source else base
        following = placed[i + 1][0] if i + 1 < len(placed) else None
        if base and (following is None or following.result is None or following.source):
            parts.append(line(base[0], base[1], base[0], y + 6, "guide"))
            base = None
        low_end, high_end = result.interval
        parts.append(line(scale(low_end), y, scale(high_end), y, "whisker"))
        parts.append(dot(x, y, row))
        parts.append(text(WIDTH, y + 4, f"{100 * result.accuracy:.1f} %", "figure", "end"))
    return svg.figure(
        WIDTH,
        bottom + 20,
        title,
        described((row.label, percent(row.result.accuracy)) for row in rows if row.result),
        [*names(placed), *parts],
    )


def differences(rows: Sequence[ChartRow], margin: float | None, title: str) -> str:
    """Accuracy less the source's with its paired interval; left of the margin lies what counts as
    worse.
    """
    compared = [(row, row.paired) for row in rows if row.paired]
    # A broken engine lies far off; it ends at the border with an arrow rather than pressing all
    # others together.
    bounds: list[float] = []
    for row, paired in compared:
        if not row.failed:
            bounds += paired.difference.interval
    low = min([0.0, -1.5 * (margin or 0.0), *bounds]) - 0.005
    high = max([0.005, *bounds]) + 0.005
    scale = Scale(
        low,
        high,
        LEFT,
        RIGHT,
    )
    parts = []
    placed, bottom = place(rows)
    if margin is not None:
        parts.append(rect(LEFT, TOP - 6, scale(-margin) - LEFT, bottom - TOP + 6, "zone"))
    parts += grid(
        scale,
        svg.ticks(low, high, 5),
        bottom,
        lambda v: f"{100 * v:+.0f}".replace("-", "\u2212") if v else "0",
    )
    parts.append(line(scale(0), TOP - 6, scale(0), bottom, "axis"))
    if margin is not None:
        parts += marked(scale(-margin), bottom, f"margin {points(-margin)}", "mark")
    for row, y in placed:
        if row.source:
            parts += [
                circle(scale(0), y, 4, "dot hollow"),
                text(WIDTH, y + 4, "reference", "figure soft", "end"),
            ]
        elif row.paired:
            parts += difference(scale, row, row.paired, y)
    description = described(
        (
            row.label,
            f"{points(paired.difference.value)}, {VERDICTS.get(row.verdict or '', 'not judged')}",
        )
        for row, paired in compared
    )
    return svg.figure(WIDTH, bottom + 20, title, description, [*names(placed), *parts])


def difference(scale: Scale, row: ChartRow, paired: Paired, y: float) -> list[str]:
    """One engine's difference with its interval and the limit that is held against the margin."""
    value = paired.difference.value
    low, high = paired.difference.interval
    parts = [line(scale(low), y, scale(high), y, "whisker")]
    if scale.holds(value):
        parts.append(dot(scale(value), y, row))
    else:
        parts.append(text(LEFT + 2, y + 4, "◂", "figure bad"))
    limit = paired.noninferiority
    if limit and scale.holds(limit.lower):
        parts.append(line(scale(limit.lower), y - 4, scale(limit.lower), y + 4, "whisker"))
    word = VERDICTS[row.verdict] if row.verdict else points(value)
    return [*parts, text(WIDTH, y + 4, word, f"figure {row.verdict or 'soft'}", "end")]


def flips(rows: Sequence[ChartRow], title: str) -> str:
    """Answers that changed against the source: lost to the left, gained to the right, and those
    wrong before and after.
    """
    compared = [(row, row.paired) for row in rows if row.paired]
    # A broken engine must not flatten the bars of all others: its own end at the border, and its
    # numbers are written out.
    longest = 1
    for row, paired in compared:
        if not row.failed:
            longest = max(longest, *changes(paired))
    unit = 42 / longest
    middle = LEFT + 74
    third = LEFT + 162
    placed, bottom = place(rows)
    parts = [line(x, TOP - 6, x, bottom, "axis") for x in (middle, third)]
    parts += [
        text(middle - 5, 14, "right→wrong", "figure bad", "end"),
        text(middle + 5, 14, "wrong→right", "figure good"),
        text(third, 14, "still wrong", "figure soft"),
    ]
    for row, y in placed:
        if row.source:
            parts.append(text(middle + 5, y + 4, "reference", "figure soft"))
        if not row.paired:
            continue
        lost, gained, other = changes(row.paired)
        parts += bar(middle, -1, lost, unit, y, "bar lost")
        parts += bar(middle, 1, gained, unit, y, "bar gained")
        parts += bar(third, 1, other, unit, y, "bar other")
    description = described(
        (row.label, "{} lost, {} gained, {} wrong both times".format(*changes(paired)))
        for row, paired in compared
    )
    return svg.figure(WIDTH, bottom + 20, title, description, [*names(placed), *parts])


def changes(paired: Paired) -> tuple[int, int, int]:
    """Items lost, items gained, and items answered otherwise but wrong both times."""
    return paired.only_source, paired.only_engine, paired.changed_both_wrong


def bar(start: float, way: int, count: int, unit: float, y: float, kind: str) -> list[str]:
    """A bar of `count` items with its number. way: -1 to the left of start, 1 to the right."""
    length = min(unit * count, 46)
    label = f"{count}…" if unit * count > 46 else str(count)
    anchor = "end" if way < 0 else "start"
    return [
        rect(start - length if way < 0 else start, y - 5, length, 10, kind),
        text(start + way * (length + 4), y + 4, label, "figure", anchor),
    ]


def reliability(before: Sequence[Bin] | None, after: Sequence[Bin], title: str) -> str:
    """Share of right answers at each stated confidence; on the diagonal confidence is honest.
    before: the source's bins, after: the engine's.
    """
    width = 176
    height = 174
    low = 0.0
    x = Scale(
        low,
        1,
        30,
        width - 12,
    )
    y = Scale(
        low,
        1,
        height - 34,
        8,
    )
    parts = [rect(30, 8, width - 42, height - 42, "frame"), line(x(0), y(0), x(1), y(1), "grid")]
    for value in (0, 0.5, 1):
        parts += [
            text(x(value), height - 20, f"{100 * value:.0f}", "figure soft", "middle"),
            text(25, y(value) + 4, f"{100 * value:.0f}", "figure soft", "end"),
        ]
    parts.append(text(x(0.5), height - 5, "stated confidence, %", "figure soft", "middle"))
    for bins, kind in ((before or (), "hollow"), (after, "")):
        total = sum(b.n for b in bins)
        parts.append(polyline(((x(b.confidence), y(b.accuracy)) for b in bins), f"path {kind}"))
        parts += [
            circle(
                x(b.confidence),
                y(b.accuracy),
                max(2.0, 9 * math.sqrt(b.n / total) if total else 2.0) / 1.4,
                f"dot {kind}",
            )
            for b in bins
        ]
    return svg.figure(
        width,
        height,
        title,
        described(
            (
                f"confidence {percent(b.confidence)}",
                f"{percent(b.accuracy)} right of {b.n}",
            )
            for b in after
        ),
        parts,
    )


def spans(rows: Sequence[Distribution], title: str, scale_of: float = 1.0) -> str:
    """Times per engine: line from the shortest to the 99th percentile (of few rounds: to the
    longest), band over the middle half, dot at the median.

    scale_of: seconds in one unit of the spreads.
    """
    known = [row for row in rows if row.median is not None]
    ends = [row.spread.get("p99", row.spread["max"]) * scale_of for row in known]
    starts = [row.spread["min"] * scale_of for row in known]
    log = max(ends) > 8 * min(starts) > 0
    low, high = (min(starts) / 1.1, max(ends) * 1.1) if log else (0.0, max(ends) * 1.06)
    scale = Scale(
        low,
        high,
        LEFT,
        RIGHT,
        log,
    )
    placed = place(rows, TOP - 16)
    unit, name = (1e3, "ms") if high < 2 else (1.0, "s")
    marks = [v / unit for v in (svg.log_ticks if log else svg.ticks)(low * unit, high * unit, 5)]
    parts = grid(scale, marks, placed[1], lambda v: f"{v * unit:.6g}", TOP - 16)
    parts.append(text(WIDTH, placed[1] + 14, name, "figure soft", "end"))
    for row, y in placed[0]:
        if row.median is None:
            continue
        at = {
            key: scale(value * scale_of)
            for key, value in row.spread.items()
            if isinstance(value, (int, float))
        }
        parts.append(line(at["min"], y, at.get("p99", at["max"]), y, "whisker"))
        if "p25" in at:
            parts.append(rect(at["p25"], y - 5, at["p75"] - at["p25"], 10, "band"))
        if "p99" in at:
            parts.append(line(at["p99"], y - 4, at["p99"], y + 4, "whisker"))
            # The slowest single token: off the axis it is an arrow, since one hiccup of the system
            # must not set the scale for all.
            parts.append(
                circle(at["max"], y, 2.5, "dot hollow")
                if scale.holds(row.spread["max"] * scale_of)
                else text(RIGHT + 1, y + 3.5, "▸", "figure soft")
            )
        parts += [
            line(scale(v * scale_of), y - 7, scale(v * scale_of), y - 5, "rug")
            for v in row.spread.get("values", ())[:200]
            if scale.holds(v * scale_of)
        ]
        parts += [
            circle(scale(row.median * scale_of), y, 4, "dot"),
            text(WIDTH, y + 4, seconds(row.median * scale_of), "figure", "end"),
        ]
    return svg.figure(
        WIDTH,
        placed[1] + 20,
        title,
        described(
            (row.label, seconds(row.median * scale_of)) for row in known if row.median is not None
        ),
        [*names(placed[0]), *parts],
    )


def memory(
    rows: Sequence[tuple[str, float, float | None]], limits: Mapping[str, float], title: str
) -> str:
    """(engine, bytes of its files, peak resident bytes or None) on a logarithmic axis, against what
    each device leaves for an engine.
    """
    sizes = [value for _, *both in rows for value in both if value] + list(limits.values())
    low = min(sizes) / 1.4
    high = max(sizes) * 1.4
    scale = Scale(
        low,
        high,
        LEFT,
        RIGHT,
        log=True,
    )
    placed, bottom = place([Distribution(name, held) for name, held, _ in rows])
    unit, unit_name = (1e9, "GB") if high >= 2e9 else (1e6, "MB")
    parts = grid(
        scale,
        [v * unit for v in svg.log_ticks(low / unit, high / unit, 5)],
        bottom,
        lambda v: f"{v / unit:.6g}",
    )
    parts.append(text(WIDTH, bottom + 14, unit_name, "figure soft", "end"))
    for name, room in limits.items():
        parts += marked(scale(room), bottom, f"{name} leaves {size(room)}", "mark limit")
    for (_, y), (_, held, peak) in zip(placed, rows, strict=True):
        if peak:
            parts += [
                line(scale(held), y, scale(peak), y, "whisker"),
                circle(scale(peak), y, 4.5, "dot"),
            ]
        parts += [
            rect(scale(held) - 4, y - 4, 8, 8, "dot hollow"),
            text(WIDTH, y + 4, size(peak) if peak else f"{size(held)} file", "figure", "end"),
        ]
    return svg.figure(
        WIDTH,
        bottom + 20,
        title,
        described((name, f"files {size(held)}, peak {size(peak)}") for name, held, peak in rows),
        [*names(placed), *parts],
    )


def pareto(marks: Sequence[CostPoint], axis: str, title: str) -> str:
    """Accuracy against cost per question; the number in a mark is the engine, its shape the
    strategy, filled marks lie on the front.
    """
    width = WIDTH
    height = 286
    left = 44
    costs = [p.cost for p in marks]
    bounds = [b for p in marks for b in ((*p.interval,) if p.front else (p.accuracy,))]
    log = max(costs) > 4 * min(costs) > 0
    low, high = (min(costs) / 1.35, max(costs) * 1.35) if log else (0.0, max(costs) * 1.1)
    x = Scale(
        low,
        high,
        left,
        width - 10,
        log,
    )
    y = Scale(
        max(0.0, min(bounds) - 0.02),
        min(1.0, max(bounds) + 0.02),
        height - 44,
        8,
    )
    parts = [
        line(left, y(v), width - 10, y(v), "grid")
        + text(left - 6, y(v) + 4, f"{100 * v:.0f}", "figure soft", "end")
        for v in svg.ticks(y.low, y.high, 6)
    ]
    parts += [
        line(x(v), 8, x(v), height - 44, "grid")
        + text(
            svg.inside(x(v), f"{v:.6g}", "middle", width),
            height - 28,
            f"{v:.6g}",
            "figure soft",
            "middle",
        )
        for v in (svg.log_ticks if log else svg.ticks)(low, high, 5)
    ]
    parts += [text((left + width) / 2, height - 8, axis, "figure soft", "middle")]
    stairs: list[tuple[float, float]] = []
    for p in sorted((p for p in marks if p.front), key=lambda p: p.cost):
        if stairs:
            stairs += [(x(p.cost), stairs[-1][1])]
        stairs.append((x(p.cost), y(p.accuracy)))
    parts.append(polyline(stairs, "front"))
    parts += [
        line(x(p.cost), y(p.interval[0]), x(p.cost), y(p.interval[1]), "whisker faint")
        for p in marks
        if p.front
    ]
    for p in sorted(marks, key=lambda p: p.front):
        kind = "front" if p.front else "behind"
        parts += [
            shape(
                SHAPES[p.strategy % len(SHAPES)], x(p.cost), y(p.accuracy), f"node {kind}", p.title
            )
        ]
        parts.append(
            text(x(p.cost), y(p.accuracy) + 3.7, str(p.engine), f"node-number {kind}", "middle")
        )
    return svg.figure(
        width,
        height,
        title,
        described((p.title, "on the front" if p.front else "behind it") for p in marks),
        parts,
    )


def shape(name: str, x: float, y: float, kind: str, title: str = "", r: float = 7.5) -> str:
    if name == "circle":
        return circle(x, y, r, kind, title)
    corners = {
        "square": (4, 45, 1.15),
        "diamond": (4, 0, 1.3),
        "triangle": (3, -90, 1.55),
        "hexagon": (6, 0, 1.15),
    }
    sides, turn, grow = corners[name]
    angles = [math.radians(turn + 360 * i / sides) for i in range(sides)]
    # A triangle's middle lies above half its height; its number must stand inside.
    down = 1.5 if name == "triangle" else 0
    return polygon(
        [(x + r * grow * math.cos(a), y + down + r * grow * math.sin(a)) for a in angles],
        kind,
        title,
    )


def key(name: str) -> str:
    """A strategy's shape alone, for the legend."""
    return (
        '<svg viewBox="0 0 24 24" class="key"'
        f' aria-hidden="true">{shape(name, 12, 12, "node behind")}</svg>'
    )


def place(rows: Sequence[Any], top: float = TOP) -> tuple[list[tuple[Any, float]], float]:
    """Each row with the height of its middle, and where the last one ends."""
    placed = []
    y = top
    for row in rows:
        heading = row.result is None if isinstance(row, ChartRow) else row.median is None
        placed.append((row, y + (HEADING + 6 if heading else ROW) / 2))
        y += HEADING if heading else ROW
    return placed, y


def names(placed: Sequence[tuple[Any, float]]) -> list[str]:
    parts = []
    for row, y in placed:
        heading = row.result is None if isinstance(row, ChartRow) else row.median is None
        parts.append(
            text(0, y + 4, svg.fit(row.label, WIDTH, bold=True), "heading")
            if heading
            else text(NAMES, y + 4, svg.fit(row.label, NAMES), "name", "end")
        )
    return parts


def grid(
    scale: Scale, at: Sequence[float], bottom: float, write: Any, top: float = TOP - 6
) -> list[str]:
    return [
        line(scale(v), top, scale(v), bottom, "grid")
        + text(scale(v), bottom + 14, write(v), "figure soft", "middle")
        for v in at
    ]


def marked(x: float, bottom: float, label: str, kind: str) -> list[str]:
    """A dashed line with its meaning above it, written to the side that has room."""
    anchor = "end" if x > (LEFT + RIGHT) / 2 else "start"
    label = svg.fit(label, WIDTH)
    at = svg.inside(x, label, anchor, WIDTH)
    return [line(x, TOP - 8, x, bottom, kind), text(at, 12, label, "figure marked", anchor)]


def dot(x: float, y: float, row: ChartRow) -> str:
    return (
        cross(x, y, 3.5, "cross")
        if row.failed
        else circle(x, y, 4, "dot hollow" if row.source else "dot")
    )


def described(pairs: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in pairs)
