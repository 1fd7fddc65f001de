"""The first thing a reader wants to know: which engine to ship, and what stands against trusting
the numbers.

An engine is named only where nothing measured speaks against it. Among those the smallest is taken;
of two of about the same size, the one with the shorter first token. Speeds measured on a busy
machine decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemed.documents.bench import BenchRecord
from edgemed.documents.evaluation import EvalResult
from edgemed.documents.gate import ComparisonRow, EngineGate
from edgemed.documents.run import RunDocument
from edgemed.formatting import percent, percent_interval, points, seconds, size
from edgemed.reporting.verdicts import DeploymentAnswer

Json = Mapping[str, Any]
# Engines whose sizes differ by less are of about the same size.
SAME_SIZE = 1.02


@dataclass(frozen=True)
class Recommendation:
    """engine: the label of the engine to ship, None where none can be named; why: in a sentence."""

    engine: str | None
    why: str

    @property
    def sentence(self) -> str:
        """The whole of it in one line."""
        return f"{self.engine}: {self.why}" if self.engine else f"none: {self.why}"


def recommend(rows: Sequence[Json], one_source: bool) -> Recommendation:
    """The engine to ship. rows: {engine (a view), answers} of verdicts.answers."""
    if not rows:
        return Recommendation(None, "no engine was built")
    if not one_source:
        return Recommendation(None, "these are engines of different models")
    reasons = {row["engine"]["label"]: against(row) for row in rows}
    able = [row for row in rows if not reasons[row["engine"]["label"]]]
    if not able:
        why = "; ".join(f"{label} {reason}" for label, reason in reasons.items())
        return Recommendation(None, why)
    smallest = min(row["engine"]["bytes"] for row in able)
    alike = [row for row in able if row["engine"]["bytes"] <= SAME_SIZE * smallest]
    chosen = min(alike, key=lambda row: (first_token(row["engine"]), row["engine"]["bytes"]))
    return Recommendation(chosen["engine"]["label"], why_this(chosen, len(able)))


def against(row: Json) -> str:
    """What speaks against shipping an engine, '' where nothing does."""
    engine = row["engine"]
    answers: Mapping[str, DeploymentAnswer] = row["answers"]
    if engine["verdict"] == "failed":
        return "failed parity"
    if engine["why_no_speed"] and engine["why_no_speed"].startswith("unbuilt"):
        return "is not built yet"
    if engine["run"].data.source.random_weights:
        return "has random weights"
    for name, words in (
        ("fits", "does not fit"),
        ("fast", "is too slow"),
        ("not_worse", "is worse than its source"),
    ):
        if answers[name].kind == "no":
            return words
    if answers["not_worse"].kind == "undecided":
        return f"is not shown to be no worse than its source ({answers['not_worse'].why})"
    return ""


def first_token(engine: Json) -> float:
    """Seconds to the first token at the longest prompt; the same for all where it says nothing."""
    record: BenchRecord | None = engine["last"]["first_token_seconds"] if engine["last"] else None
    if record is None or is_busy(record):
        return 0.0
    return record.value


def is_busy(record: BenchRecord) -> bool:
    return bool(record.state and record.state.busy)


def why_this(row: Json, able: int) -> str:
    """Size, first token, and accuracy with its limit against the margin."""
    engine = row["engine"]
    rank = "the only one that can be shipped" if able == 1 else f"the smallest of {able}"
    parts = [f"{size(engine['bytes'])}, {rank}"]
    if engine["last"]:
        record = engine["last"]["first_token_seconds"]
        machine = ", on a busy machine" if is_busy(record) else ""
        parts.append(
            f"first token {seconds(record.value)} at {engine['last']['prompt']} tokens{machine}"
        )
    gate: EngineGate | None = engine["gate"]
    if gate is not None and gate.comparisons:
        parts.append(accuracy(gate))
    elif engine["evals"]:
        parts.append("accuracy was measured and not judged")
    else:
        parts.append("accuracy was not measured")
    if engine["verdict"] != "passed":
        parts.append("parity was not checked")
    return "; ".join(parts)


def accuracy(gate: EngineGate) -> str:
    worst: ComparisonRow = min(gate.comparisons, key=lambda row: row.lower)
    return (
        f"accuracy on {worst.task} {points(worst.difference)}, lower limit"
        f" {points(worst.lower)} against a margin of {points(-gate.margin)}"
    )


def warnings(engines: Sequence[Json], documents: Sequence[RunDocument]) -> list[str]:
    """What a reader must know before the numbers: busy machines, and sources that are no better
    than the most frequent answer.
    """
    sentences = []
    for engine in engines:
        reason = busy_reason(engine)
        if reason:
            sentences.append(
                f"machine busy while {engine['label']} was measured: {reason}. Its speeds are too"
                " low, and no engine is called the fastest"
            )
    for document in documents:
        results = document.source_evals or tuple(
            result for engine in document.engines for result in engine.evals
        )
        sentences += [sentence for result in results if (sentence := no_signal(result))]
    return list(dict.fromkeys(sentences))


def busy_reason(engine: Json) -> str | None:
    """Who kept the machine busy while an engine was measured."""
    for record in engine["values"].values():
        if record.state and record.state.busy:
            return str(record.state.busy_reason)
    return None


def no_signal(result: EvalResult) -> str:
    """Whether the source answers no better than always giving the most frequent answer, in words;
    '' where it does. An engine cannot be seen to lose what its source does not have.
    """
    if result.majority is None:
        return ""
    if result.paired is None:
        if result.interval[0] > result.majority:
            return ""
        found = f"{percent(result.accuracy)} ({percent_interval(result.interval)})"
    else:
        correct = result.paired.source_correct
        if correct is None or correct / result.n > result.majority:
            return ""
        found = percent(correct / result.n)
    return (
        f"on {result.task} the source itself is not shown to be better than always giving the most"
        f" frequent answer: {found} against {percent(result.majority)}. That an engine is not worse"
        " says little there"
    )


@dataclass(frozen=True)
class Fastest:
    """engine: the view of the engine that decodes fastest, None where none can be named; why: the
    reason then.
    """

    engine: Json | None
    why: str = ""


def fastest(engines: Sequence[Json]) -> Fastest:
    """The engine that decoded fastest in every round. None is named where the machine was busy, or
    where a round of another one was as fast as one of the winner's.

    engines: measured on one machine, of one source.
    """
    name = "decode_tokens_per_second"
    measured = [engine for engine in engines if name in engine["values"]]
    if not measured:
        return Fastest(None)
    if any(busy_reason(engine) for engine in measured):
        return Fastest(None, "the machine was busy")
    winner = max(measured, key=lambda engine: engine["values"][name].value)
    least = winner["values"][name].spread.min
    rivals = [e["values"][name].spread.max for e in measured if e is not winner]
    if rivals and least <= max(rivals):
        return Fastest(None, "rounds disagree")
    return Fastest(winner)
