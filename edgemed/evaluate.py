"""Accuracy of an engine, or of its source, on the same items, by option log-likelihood.

The engine that ships is what is scored, through the same two session primitives for every runtime; a result names the task
file's sha256, and results on different files or different items are never paired.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgemed.console import track
from edgemed.errors import EdgemedError
from edgemed.session import Session, score_options
from edgemed.task import Example, Prompt, Questions
from edgemed.tokenizer import encode

SCORING = {"lm": "sum of option token log-likelihoods", "choice": "multiple-choice head", "classes": "sequence-classification head"}


def evaluate(session: Session, tokenizer: Any, questions: Questions, model: str, engine_key: str | None = None) -> dict[str, Any]:
    """Answer every question. Contexts that do not fit lose their first tokens, options never; how many did is reported.

    Returns {task, model, n, correct, accuracy, truncated, seconds, items: [{id, gold, answer, scores}], ...}.
    """
    items, truncated, started = [], 0, time.perf_counter()
    for example in track(questions.examples, f"{questions.task.name} on {model}"):
        scores, cut = answer(session, tokenizer, example, questions.task.render(example))
        truncated += cut
        items.append({"id": example.id, "gold": example.gold, "answer": int(np.argmax(scores)), "scores": [round(float(s), 6) for s in scores]})
    correct = sum(item["answer"] == item["gold"] for item in items)
    return {
        "task": questions.task.name, "model": model, "engine_key": engine_key, "task_sha256": questions.sha256, "n": len(items), "correct": correct,
        "accuracy": correct / len(items), "majority": majority(questions), "truncated": truncated, "seconds": round(time.perf_counter() - started, 3),
        "scoring": SCORING[session.head], "items": items, "paired": None,
    }


def majority(questions: Questions) -> float:
    """Accuracy of always giving the most frequent answer."""
    golds = [example.gold for example in questions.examples]
    return max(golds.count(gold) for gold in set(golds)) / len(golds)


def answer(session: Session, tokenizer: Any, example: Example, prompt: Prompt) -> tuple[list[float], bool]:
    """(score per option, whether the context was cut)."""
    context = encode(tokenizer, prompt.context)
    if session.head == "classes":
        if session.width != len(example.options):
            raise EdgemedError(f"the head gives {session.width} classes, question {example.id} has {len(example.options)} options", "Evaluate it on the task it was trained for")
        session.rewind(0)
        return session.prefill(context[-session.context :])[0].tolist(), len(context) > session.context
    options = []
    for option in prompt.options:
        # Encoded together, so that a tokenizer that merges across the border is asked what it would really see.
        whole = encode(tokenizer, prompt.context + option)
        options.append(whole[len(context) :] if whole[: len(context)] == context else encode(tokenizer, option))
    longest = max(map(len, options))
    room = session.context - longest
    if room < 1:
        raise EdgemedError(f"an option of question {example.id} has {longest} tokens, the context is {session.context}", "Shorten the option")
    kept = context[-room:]
    if session.head == "choice":
        scores = []
        for option in options:
            session.rewind(0)
            scores.append(float(session.prefill(kept + option)[0, 0]))
        return scores, len(kept) < len(context)
    return score_options(session, kept, options), len(kept) < len(context)


def pair(engine: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, int]:
    """What changed between source and engine, item by item.

    Raises EdgemedError where the two were not measured on the same items of the same file.
    """
    ids = [[item["id"] for item in result["items"]] for result in (engine, source)]
    if engine["task_sha256"] != source["task_sha256"] or ids[0] != ids[1]:
        raise EdgemedError(f"{engine['task']}: engine and source were evaluated on different items", "Evaluate both on the same task file")
    counts = {"both": 0, "only_source": 0, "only_engine": 0, "neither": 0, "changed": 0}
    for a, b in zip(engine["items"], source["items"], strict=True):
        right = (b["answer"] == b["gold"], a["answer"] == a["gold"])
        counts[{(True, True): "both", (True, False): "only_source", (False, True): "only_engine", (False, False): "neither"}[right]] += 1
        counts["changed"] += a["answer"] != b["answer"]
    return counts | {"source_correct": source["correct"]}
