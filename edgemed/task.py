"""An evaluation task: rows of a JSONL file turned into questions with options, and the facts that go with them.

A task file states source, licence, split, metric and prompt once; a user's own data in the same layout works by path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemed import plugins
from edgemed.data import read_jsonl
from edgemed.errors import EdgemedError
from edgemed.store import file_sha256


@dataclass(frozen=True)
class Example:
    """One question. question: what is asked, the options not in it; options: their texts as a person reads them; gold indexes options.

    groups: by what accuracy is shown besides, e.g. {'subject': 'anatomy', 'language': 'en'}.
    """

    id: str
    question: str
    options: tuple[str, ...]
    gold: int
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What a model reads. options: one continuation of `context` per option, appended as it is (so each starts with a space)."""

    context: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What a file in tasks/ defines. example(row) -> Example; it may raise KeyError or ValueError for a malformed row.

    render(example) -> Prompt. prompt: the same wording, for people. languages: those a row may name. lettered: render lists the options under letters
    and asks for one. shots: a file beside the sample with solved examples for few-shot prompts, none of them from the evaluated split.
    description: what stands before everything else in the prompt.
    """

    name: str
    source: str
    licence: str
    split: str
    metric: str
    prompt: str
    sample: str
    example: Callable[[Mapping[str, Any]], Example]
    render: Callable[[Example], Prompt]
    languages: tuple[str, ...] = ("en",)
    lettered: bool = False
    shots: str = ""
    description: str = ""


@dataclass(frozen=True)
class Questions:
    """The examples of a task, and the sha256 of the file they came from: results on different files are never paired."""

    task: Task
    sha256: str
    examples: tuple[Example, ...]


def questions(spec: str, limit: int | None = None) -> Questions:
    """'pubmedqa' (the shipped sample) or 'pubmedqa:path.jsonl' (user data in the same layout).

    Raises EdgemedError for an empty file, a malformed row, a duplicate id, fewer than two options or a gold answer outside them.
    """
    name, _, path = spec.partition(":")
    task: Task = plugins.load("tasks", name).TASK
    file = Path(path) if path else plugins.ROOT / "tasks" / "samples" / task.sample
    if not file.is_file():
        raise EdgemedError(f"task file {file} does not exist", f"Give {name}:FILE.jsonl in the layout of tasks/samples/{task.sample}")
    examples, seen = [], set()
    for number, row in enumerate(read_jsonl(file), 1):
        where = f"{file} row {number}"
        try:
            example = task.example(row)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise EdgemedError(f"{where}: not a {name} row ({error!r})", f"Compare with tasks/samples/{task.sample}") from None
        if example.id in seen:
            raise EdgemedError(f"{where}: id '{example.id}' occurs twice", "Give every row its own id")
        if len(example.options) < 2 or not 0 <= example.gold < len(example.options):
            raise EdgemedError(f"{where}: {len(example.options)} options, gold answer number {example.gold}", "Two or more options, and gold among them")
        seen.add(example.id)
        examples.append(example)
    if not examples:
        raise EdgemedError(f"task file {file} is empty", "Give at least one row")
    return Questions(task, file_sha256(file), tuple(examples[:limit]))
