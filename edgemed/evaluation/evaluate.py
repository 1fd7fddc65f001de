"""Accuracy of an engine, or of its source, on the same items, and what changed between the two.

The engine that ships is what is scored, through the same two session primitives for every runtime.
A result names the items and the model it belongs to, so that only an engine and its own source, on
the very same items, are ever paired.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgemed.artifacts import hashing, lineage
from edgemed.console import track
from edgemed.documents.evaluation import EvalResult, Item, Score
from edgemed.documents.gate import EngineGate, GateVerdict
from edgemed.errors import EdgemedError
from edgemed.evaluation import answer_matching, confidence, paired_statistics
from edgemed.evaluation.answerer import Answerer
from edgemed.evaluation.prompting import ZERO_SHOT, ModelAnswer, PromptPlan, PromptSettings
from edgemed.evaluation.task import Example, Questions
from edgemed.hardware.device import machine
from edgemed.hardware.power_sensors import Meter
from edgemed.inference.session import Session

SCORING = {
    "sum": "sum of option token log-likelihoods",
    "normalised": "option log-likelihood per character",
    "generated": "the option a greedily generated answer names",
    "choice": "multiple-choice head",
    "classes": "sequence-classification head",
}
OPEN = "exact match of a greedily generated answer"
SOURCE = "source (float32)"


def evaluate(
    session: Session,
    tokenizer: Any,
    questions: Questions,
    model: str,
    model_key: str,
    plan: PromptPlan = ZERO_SHOT,
    before: Callable[[Example], None] | None = None,
) -> EvalResult:
    """Answer every question. Contexts that do not fit lose their first tokens, options and prompts
    with images never; how many did is reported.

    plan: how the questions are put. before: what is done to the session before each question; its
    time counts. model_key: the engine's key, or source_key of a checkpoint. Raises EdgemedError
    where this engine or task cannot follow the strategy.
    """
    answerer = Answerer(session, tokenizer, questions, plan)
    answerer.check()
    items = []
    truncated = 0
    started = time.perf_counter()
    synthetic = " (synthetic sample)" if questions.synthetic else ""
    label = f"{questions.task.name}{synthetic}, {plan.strategy.name}, on {model}"
    with Meter(on_gpu=getattr(session, "device", "cpu") == "cuda") as meter:
        for example in track(questions.examples, label):
            if before:
                before(example)
                answerer.reader.clear()
            answer = answerer.answer(example)
            truncated += answer.cut
            items.append(item_of(example, answer))
    seconds = time.perf_counter() - started
    n = len(items)
    correct = sum(item.answer == item.gold for item in items)
    joules = meter.joules
    scores: dict[str, Score] = {}
    if questions.task.scores:
        scores = questions.task.scores(list(zip(questions.examples, items, strict=True)))
    return EvalResult(
        task=questions.task.name,
        language=questions.language,
        part=questions.part,
        file=questions.file,
        synthetic=questions.synthetic,
        task_sha256=questions.sha256,
        task_key=questions.key,
        model=model,
        model_key=model_key,
        strategy=plan.strategy.name,
        scoring=scoring_of(questions, session.head, plan.settings),
        settings=settings_of(plan, questions.has_vision, answerer.begin),
        n=n,
        correct=correct,
        accuracy=correct / n,
        interval=paired_statistics.wilson(correct, n),
        majority=majority(questions),
        truncated=truncated,
        unparsed=sum(item.answer < 0 for item in items),
        seconds=round(seconds, 3),
        seconds_per_question=seconds / n,
        tokens_read=answerer.reader.tokens_read,
        tokens_generated=answerer.reader.tokens_generated,
        joules=joules,
        joules_per_question=None if joules is None else joules / n,
        machine=machine()["label"],
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        calibration=confidence.summary(items),
        items=tuple(items),
        paired=None,
        scores=scores,
    )


def item_of(example: Example, answer: ModelAnswer) -> Item:
    """One item of a result. text: what was written; said: the same normalised, of an open question,
    so that two wrong answers can be told apart.
    """
    return Item(
        id=example.id,
        gold=example.gold,
        answer=answer.option,
        scores=tuple(round(score, 6) for score in answer.scores),
        groups=dict(example.groups),
        text=answer.text,
        said=None if example.options else answer_matching.normalised(answer.text or ""),
    )


def scoring_of(questions: Questions, head: str, settings: PromptSettings) -> str:
    """How the answers were scored, in words."""
    method = SCORING[settings.scoring if head == "lm" else head]
    opened = sum(not example.options for example in questions.examples)
    if opened == len(questions.examples):
        return OPEN
    return f"{method}; open questions: {OPEN}" if opened else method


def settings_of(plan: PromptPlan, has_vision: bool, begin: Sequence[int] = ()) -> dict[str, Any]:
    """What a strategy besides its name depends on, for the record. has_vision: whether the task
    shows images, whose models reason when they generate. begin: tokens that begin every prompt.
    """
    settings = plan.settings
    parts = (plan.strategy, *plan.strategy.members)
    record: dict[str, Any] = {}
    if any(p.k or p.votes > 1 for p in parts):
        record["seed"] = settings.seed
    if any(p.shots == "nearest" for p in parts):
        record["nearest_by"] = "TF-IDF over character trigrams"
    if any(p.reason for p in parts) or (has_vision and settings.scoring == "generated"):
        record["rationale_tokens"] = settings.rationale
    if any(p.reason and p.votes > 1 for p in parts):
        record["temperature"] = settings.temperature
    if begin:
        record["begin_tokens"] = list(begin)
    if not settings.add_special_tokens:
        record["add_special_tokens"] = False
    return record


def majority(questions: Questions) -> float:
    """Accuracy of always giving the most frequent answer."""
    golds = [
        (example.gold, answer_matching.normalised(example.reference))
        for example in questions.examples
    ]
    return max(golds.count(gold) for gold in set(golds)) / len(golds)


def source_key(files: Mapping[str, str]) -> str:
    """Name of a checkpoint by its contents. files: file -> sha256."""
    return hashing.digest(dict(files))


def adapter_of(manifest: Mapping[str, Any], name: str) -> dict[str, str]:
    """Input -> sha256 of the files of one of an engine's adapters."""
    return {
        file: sha for file, sha in manifest["inputs"].items() if file.startswith(f"adapter/{name}/")
    }


def pair(
    engine: EvalResult,
    source: EvalResult,
    manifest: Mapping[str, Any],
    margin: float | None,
    alpha: float,
    adapter: str | None = None,
) -> EvalResult:
    """The engine's result with what changed against its source, item by item. manifest: the
    engine's; adapter: the one both were evaluated with.

    margin None: the statistics are given, and no verdict. Raises EdgemedError where the two results
    do not belong together.
    """
    where = f"{engine.task} on {engine.model}"
    adapter_files = adapter_of(manifest, adapter) if adapter else {}
    sources = {
        source_key(lineage.read(ancestor) | adapter_files)
        for _, ancestor in lineage.ancestors(manifest)
    }
    if source.model_key not in sources:
        raise EdgemedError(
            f"{where}: the result of '{source.model}' is not that of a source of this engine",
            "Pair an engine only with the checkpoint it was made from",
        )
    return paired_with(engine, source, margin, alpha)


def pair_engines(
    engine: EvalResult, other: EvalResult, margin: float | None, alpha: float
) -> EvalResult:
    """An engine's result with what changed against another engine, item by item: the statistics are
    those of `pair`, and the other engine stands in the source's place.

    Raises EdgemedError where the two were not asked the same, or are the same engine.
    """
    if engine.model_key == other.model_key:
        raise EdgemedError(
            f"{engine.model} is compared with itself", "Give the directory of another engine"
        )
    return paired_with(engine, other, margin, alpha)


def paired_with(
    engine: EvalResult, source: EvalResult, margin: float | None, alpha: float
) -> EvalResult:
    """The engine's result with the paired statistics. Raises EdgemedError where the two results
    were not made in the same way.
    """
    where = f"{engine.task} on {engine.model}"
    for key, what in (
        ("task_key", "another version, part or file of the task"),
        ("strategy", "another strategy"),
        ("scoring", "another scoring"),
        ("settings", "other settings"),
    ):
        if getattr(engine, key) != getattr(source, key):
            raise EdgemedError(
                f"{where}: the source was evaluated on {what}", "Evaluate both the same way"
            )
    statistics = paired_statistics.paired(items_in(source), items_in(engine), margin, alpha)
    return replace(engine, paired=replace(statistics, source_model=source.model))


def items_in(result: EvalResult) -> tuple[Item, ...]:
    """A result's items. Raises EdgemedError where it was kept without them."""
    if result.items is None:
        raise EdgemedError(
            f"the result of {result.model} on {result.task} holds no items",
            "Evaluate it again with edgemed eval --out",
        )
    return result.items


def judge(
    results: Mapping[str, Sequence[EvalResult]], margin: float, alpha: float
) -> GateVerdict | None:
    """The gate over engines. results: engine name -> its paired results. Only the first strategy of
    each task is judged: it is the one that ships.

    Returns None where nothing was paired.
    """
    compared = []
    seen = set()
    for engine, rows in results.items():
        for row in rows:
            if row.paired and (engine, row.task_key) not in seen:
                seen.add((engine, row.task_key))
                compared.append(((engine, row.title, row.strategy), row.paired))
    return paired_statistics.gate(compared, margin, alpha) if compared else None


def part_of(gate: GateVerdict | None, engine: str) -> EngineGate | None:
    """One engine's share of the gate: its comparisons and the worst of their verdicts; the
    correction is that over all engines.
    """
    if gate is None:
        return None
    comparisons = tuple(row for row in gate.comparisons if row.engine == engine)
    if not comparisons:
        return None
    return EngineGate(
        margin=gate.margin,
        alpha=gate.alpha,
        correction=gate.correction,
        verdict=paired_statistics.worst_verdict(comparisons),
        comparisons=comparisons,
    )
