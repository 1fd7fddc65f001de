"""What a mixture's experts are used for: tokens per expert by task and language, and what the
authors' noise in choosing them does to answers.

Run on the float reference with a task's own questions, so that an expert nobody needs, or a
language that knows only one, is seen before anything is merged or quantized.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from edgemed.console import track
from edgemed.data.text_sets import calibration_sequences, read_card
from edgemed.documents.evaluation import EvalResult
from edgemed.errors import EdgemedError
from edgemed.evaluation.answerer import Answerer
from edgemed.evaluation.evaluate import SOURCE, items_in
from edgemed.evaluation.opened_model import evaluate_opened, open_source
from edgemed.evaluation.prompting import PromptPlan, PromptSettings
from edgemed.evaluation.task import questions
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.moe.routing import ExpertUsage, Noisy


def count_expert_usage(
    source: Checkpoint,
    tasks: Sequence[str] = (),
    cards: Sequence[str] = (),
    limit: int | None = None,
    samples: int = 16,
    length: int = 256,
) -> list[dict[str, Any]]:
    """One row per task or card, language and sparse layer: tokens per expert, their shares, entropy
    in nats and the effective number of experts exp(entropy).

    Of a task all that is read for its questions counts (image features, question, options; a
    beginning read once for several counts once), of a card `samples` windows of `length` tokens. A
    token counts for each expert it chose. Raises EdgemedError for a model without experts, and
    where nothing is to be read.
    """
    weights = CanonicalWeights(source)
    if weights.decoder.experts is None:
        raise EdgemedError(f"{source.path} has no mixtures of experts", "Give a model that has")
    if not tasks and not cards:
        raise EdgemedError(
            "neither a task nor a text set is given",
            "For example --task cells, or --calibration medquad-answers",
        )
    every = [questions(task, limit) for task in tasks]
    route = ExpertUsage()
    opened = open_source(source, any(task_questions.has_vision for task_questions in every), route)
    try:
        for spec, task_questions in zip(tasks, every, strict=True):
            plan = PromptPlan(stop=opened.stop)
            answerer = Answerer(opened.session, opened.tokenizer, task_questions, plan)
            answerer.check()
            for example in track(task_questions.examples, f"count the experts of {spec}"):
                route.group = (
                    spec,
                    example.groups.get("language")
                    or task_questions.language
                    or task_questions.task.languages[0],
                )
                answerer.answer(example)
        for name in cards:
            route.group = (name, str(read_card(name).metadata.get("language", "")))
            for window in track(
                calibration_sequences(name, opened.tokenizer, samples, length),
                f"count the experts of {name}",
            ):
                opened.session.rewind(0)
                opened.session.prefill(window)
    finally:
        opened.close()
    active = weights.decoder.experts.active
    return [
        {"of": name, "language": language, "layer": n, **_row(counts.tolist(), active)}
        for (name, language), layers in route.tokens.items()
        for n, counts in sorted(layers.items())
    ]


def _row(tokens: list[int], active: int) -> dict[str, Any]:
    shares = [count / sum(tokens) for count in tokens]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return {
        "tokens": sum(tokens) // active,
        "experts": tokens,
        "shares": shares,
        "entropy": entropy,
        "effective": math.exp(entropy),
    }


def spread(
    source: Checkpoint, task: str, seeds: int, scale: float = 1.0, limit: int | None = None
) -> dict[str, Any]:
    """What routing.Noisy with seeds 0 to seeds - 1 does to a task: accuracy without noise and of
    each seed, and the share of questions whose answer is another than without noise.

    Raises EdgemedError as Noisy and evaluate.
    """
    if seeds < 1:
        raise EdgemedError(f"{seeds} seeds of noise", "Give 1 or more")
    d = CanonicalWeights(source).decoder
    task_questions = questions(task, limit)
    routes = [None, *(Noisy(d, seed, scale) for seed in range(seeds))]
    results = []
    for route in routes:
        opened = open_source(source, task_questions.has_vision, route)
        results.append(
            evaluate_opened(opened, task_questions, SOURCE, "", "zero-shot", PromptSettings())
        )
        opened.close()
    plain = results[0]
    noisy = results[1:]
    changed = [_share_changed(plain, result) for result in noisy]
    accuracies = [result.accuracy for result in noisy]
    return {
        "task": task,
        "n": plain.n,
        "scale": scale,
        "accuracy": plain.accuracy,
        "interval": list(plain.interval),
        "noisy": accuracies,
        "mean": statistics.mean(accuracies),
        "deviation": statistics.stdev(accuracies) if seeds > 1 else None,
        "changed": changed,
        "mean_changed": statistics.mean(changed),
    }


def _share_changed(plain: EvalResult, noisy: EvalResult) -> float:
    """The share of questions that two results answer differently."""
    pairs = zip(items_in(plain), items_in(noisy), strict=True)
    return sum(a.answer != b.answer for a, b in pairs) / plain.n
