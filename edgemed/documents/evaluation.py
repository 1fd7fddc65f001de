"""Accuracy of one model on one task with one strategy, and what changed between an engine and its
float32 source on the same items.

An item is one question; its identity and its gold answer decide what may be paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from edgemed.documents.document import LEFT_OUT, Document, Pattern
from edgemed.documents.machine import Count
from edgemed.params import Doc, Range

Sha256 = Annotated[str, Pattern("sha256", "^[0-9a-f]{64}$")]
Share = Annotated[float, Range(0, 1)]
Interval = Annotated[tuple[float, float], Doc("[low, high]")]
Verdict = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Item(Document):
    """One question and its answer."""

    id: str
    gold: Count
    answer: Annotated[int, Range(-1), Doc("-1: named no option")]
    scores: Annotated[
        tuple[float, ...], Doc("log score per option; empty where the answer was generated")
    ]
    groups: Mapping[str, str]
    text: Annotated[
        str | None,
        LEFT_OUT,
        Doc("what the model wrote, where words and not letters were asked for"),
    ] = None
    said: Annotated[
        str | None,
        LEFT_OUT,
        Doc("the same normalised, of open questions, whose answer is 0 right, 1 wrong, -1 nothing"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Bin(Document):
    """Answers of about the same confidence."""

    confidence: Share
    accuracy: Share
    n: Count


@dataclass(frozen=True, kw_only=True)
class Coverage(Document):
    """How many answers one confidence threshold can release at the target accuracy."""

    target: Share
    coverage: Annotated[float | None, Range(0, 1), Doc("share of answers above the threshold")]
    threshold: Annotated[float | None, Range(0, 1)]
    accuracy: Annotated[float | None, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Calibration(Document):
    """What a model's confidence is worth."""

    n: Annotated[int | None, Range(0), LEFT_OUT, Doc("answers with scores")] = None
    left_out: Annotated[int | None, Range(0), LEFT_OUT, Doc("answers without scores")] = None
    ece: Annotated[float | None, Range(0, 1), Doc("expected calibration error, adaptive bins")]
    brier: float | None
    bins: Annotated[tuple[Bin, ...] | None, LEFT_OUT] = None
    coverage: Coverage | None


@dataclass(frozen=True, kw_only=True)
class Difference(Document):
    """Accuracy of the engine less the source's, with its paired interval."""

    value: Annotated[float, Doc("engine less source")]
    interval: Interval
    method: str


@dataclass(frozen=True, kw_only=True)
class NonInferiority(Document):
    """The one-sided test of a loss of at least the margin."""

    margin: float
    alpha: float
    lower: Annotated[float, Doc("one-sided lower limit at 1 - alpha")]
    upper: float
    p: Annotated[Share, Doc("of H0: difference <= -margin")]
    p_inferior: Annotated[Share, Doc("of H0: difference >= -margin")]


@dataclass(frozen=True, kw_only=True)
class Subgroup(Document):
    """Engine against source on the items of one group."""

    group: str
    value: str
    n: Count
    source: Share
    engine: Share
    difference: float
    interval: Interval
    only_source: Count
    only_engine: Count


@dataclass(frozen=True, kw_only=True)
class Paired(Document):
    """Engine against source, item by item. noninferiority and verdict are null where no margin was
    given; the verdict here is uncorrected.
    """

    n: Count
    both: Annotated[int | None, Range(0), LEFT_OUT] = None
    only_source: Annotated[Count, Doc("right -> wrong")]
    only_engine: Annotated[Count, Doc("wrong -> right")]
    neither: Annotated[int | None, Range(0), LEFT_OUT] = None
    changed: Annotated[int | None, Range(0), LEFT_OUT] = None
    changed_both_wrong: Count
    source_correct: Annotated[int | None, Range(0), LEFT_OUT] = None
    engine_correct: Annotated[int | None, Range(0), LEFT_OUT] = None
    difference: Difference
    newcombe: Annotated[Interval | None, LEFT_OUT] = None
    mcnemar_p: Annotated[Share, Doc("exact, two-sided")]
    minimum_detectable: Annotated[float | None, Doc("smallest true loss found with power 0.8")]
    noninferiority: NonInferiority | None = None
    items_needed: Annotated[int | None, Range(0)]
    verdict: Verdict | None = None
    subgroups: tuple[Subgroup, ...]
    worst: Subgroup | None
    source_model: Annotated[str | None, LEFT_OUT] = None


@dataclass(frozen=True, kw_only=True)
class Score(Document):
    """A metric of the task's own. value: null where nothing of that kind was asked."""

    value: float | None
    n: Count


@dataclass(frozen=True, kw_only=True)
class EvalResult(Document):
    """One model on one task with one strategy. interval: Wilson, 95 %. items stay with the run and
    are missing in an engine's manifest.
    """

    task: str
    language: str | None
    part: Annotated[str | None, Doc("which of a task's parts, e.g. image_disjoint")] = None
    file: Annotated[
        str | None,
        LEFT_OUT,
        Doc("name of a user's own file, which is neither the shipped sample nor the published set"),
    ] = None
    synthetic: Annotated[bool, Doc("measured on a stand-in, which says nothing about accuracy")] = (
        False
    )
    task_sha256: Sha256
    task_key: Annotated[Sha256, Doc("digest of file, name, language, limit and wording")]
    model: str
    model_key: Sha256
    strategy: str
    scoring: str
    settings: Mapping[str, Any]
    n: Annotated[int, Range(1)]
    correct: Count
    accuracy: Share
    interval: Interval
    majority: Annotated[
        float | None, Range(0, 1), Doc("accuracy of always giving the most frequent answer")
    ]
    truncated: Annotated[Count, Doc("contexts that lost their first tokens")]
    unparsed: Annotated[Count, Doc("generated answers that named no option; counted as wrong")]
    seconds: float
    seconds_per_question: float
    tokens_read: Annotated[int | None, Range(0), LEFT_OUT] = None
    tokens_generated: Annotated[int | None, Range(0), LEFT_OUT] = None
    joules: float | None
    joules_per_question: float | None
    machine: Annotated[str, Doc("its label")]
    when: str
    calibration: Annotated[Calibration | None, LEFT_OUT] = None
    items: Annotated[tuple[Item, ...] | None, LEFT_OUT] = None
    paired: Paired | None
    scores: Annotated[Mapping[str, Score] | None, LEFT_OUT, Doc("metrics of the task's own")] = None

    @property
    def title(self) -> str:
        """The task by name, its language or part where only one was asked for, and a user's own
        file: 'worldmedqa/he', 'medqa:ours.jsonl'.
        """
        return task_title(self.task, self.language or self.part, self.file)


def task_title(task: str, subset: str | None, file: str | None) -> str:
    """See EvalResult.title. subset: a language or a part."""
    return f"{task}{f'/{subset}' if subset else ''}{f':{file}' if file else ''}"
