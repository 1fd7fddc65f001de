"""An evaluation task: rows of a JSONL file turned into questions with options, and the facts that go with them.

A task file states source, licence, split, metric and prompt once; a user's own data in the same layout works by path.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemed import plugins
from edgemed.data import read_jsonl
from edgemed.errors import EdgemedError, nearest
from edgemed.store import digest, file_sha256

LETTERS = string.ascii_uppercase


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

    render(example) -> Prompt. prompt: the same wording, for people. wording: whose it is. languages: those a row may name. lettered: render lists
    the options under letters and asks for one. shots: a file beside the sample with solved examples for few-shot prompts, none of them from the
    evaluated rows. description: what stands before everything else in the prompt; a group's name in braces stands for the example's (see describe).
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
    wording: str = ""
    languages: tuple[str, ...] = ("en",)
    lettered: bool = False
    shots: str = ""
    description: str = ""


@dataclass(frozen=True)
class Questions:
    """The examples of a task, and the sha256 of the file they came from: results on different files are never paired.

    language: the one asked for, None for all. key: digest of the file and of every word a model is shown, solved examples included; results with
    different keys are never paired. shots: solved examples, none of whose questions is asked.
    """

    task: Task
    sha256: str
    examples: tuple[Example, ...]
    language: str | None = None
    key: str = ""
    shots: tuple[Example, ...] = ()


def text(row: Mapping[str, Any], name: str) -> str:
    """A field that must hold words. Raises KeyError or ValueError."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{name}' is blank" if isinstance(value, str) else f"'{name}' is not a text")
    return value


def multiple_choice(row: Mapping[str, Any], *groups: str) -> Example:
    """The usual layout: {"id", "question", "options": {"A": text, ...} or [text, ...], "answer": letter, or index from 0}.

    groups: fields that become groups where the row has them. Raises KeyError or ValueError.
    """
    options, answer = row["options"], row["answer"]
    if not isinstance(options, (Mapping, list)):
        raise ValueError("'options' is neither a mapping nor a list")
    names = list(options) if isinstance(options, Mapping) else list(LETTERS[: len(options)])
    texts = tuple(options.values()) if isinstance(options, Mapping) else tuple(options)
    if answer in names:
        gold = names.index(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool):
        gold = answer
    else:
        raise ValueError(f"the answer {answer!r} is none of the {len(texts)} options {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
    return Example(str(row["id"]), text(row, "question"), texts, gold, {name: text(row, name) for name in groups if name in row})


def choice(row: Mapping[str, Any], options: tuple[str, ...]) -> int:
    """Which of a task's fixed options "answer" names. Raises KeyError or ValueError."""
    if row["answer"] not in options:
        raise ValueError(f"the answer {row['answer']!r} is none of {', '.join(options)}")
    return options.index(row["answer"])


def lettered(options: tuple[str, ...]) -> str:
    """'A. first', 'B. second', one a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def letters(options: tuple[str, ...]) -> tuple[str, ...]:
    """' A', ' B', one per option: what a lettered prompt is continued with."""
    return tuple(f" {letter}" for letter, _ in zip(LETTERS, options, strict=False))


def describe(task: Task, example: Example) -> str:
    """What stands before everything else in this example's prompt: 'The following are ... about anatomy.'"""
    return task.description.format_map(example.groups)


def questions(spec: str, limit: int | None = None) -> Questions:
    """The examples of NAME[/LANGUAGE][:FILE.jsonl]: 'pubmedqa' (the shipped sample), 'headqa/es', 'worldmedqa/he:mine.jsonl' (a user's own rows).

    limit: only the first rows of that language (shipped samples are shuffled). Raises EdgemedError for an unknown name or language, an empty file,
    a malformed row, a duplicate id, fewer than two options, an empty option, two that cannot be told apart, or a gold answer outside them.
    """
    head, colon, path = spec.partition(":")
    name, slash, language = head.partition("/")
    task: Task = plugins.load("tasks", name).TASK
    if slash and language not in task.languages:
        raise EdgemedError(f"task {name} has no language '{language}'", nearest(language, task.languages))
    folder = plugins.ROOT / "tasks" / "samples"
    file = Path(path) if colon else folder / task.sample
    if not file.is_file():
        raise EdgemedError(f"task file {path or repr(path)} does not exist", f"Give {head}:FILE.jsonl in the layout of tasks/samples/{task.sample}")
    if limit is not None and limit < 1:
        raise EdgemedError(f"a limit of {limit} questions leaves none", "Give 1 or more")
    examples = _examples(file, task, language)[:limit]
    asked = {_plain(example) for example in examples}
    shots = tuple(shot for shot in _examples(folder / task.shots, task, language) if _plain(shot) not in asked) if task.shots else ()
    sha256 = file_sha256(file)
    shown = [[describe(task, e), task.render(e).context, task.render(e).options, e.gold] for e in (*examples, *shots)]
    key = digest({"file": sha256, "task": name, "language": language or None, "n": len(examples), "shown": shown})
    return Questions(task, sha256, examples, language or None, key, shots)


def _examples(file: Path, task: Task, language: str) -> tuple[Example, ...]:
    examples, seen = [], set()
    for number, row in enumerate(read_jsonl(file), 1):
        where = f"{file} row {number}"
        spoken = row.get("language") or language or (task.languages[0] if len(task.languages) == 1 else None)
        if spoken is None:
            raise EdgemedError(f"{where} names no language", f'Add "language", or ask for one, e.g. {task.name}/{task.languages[0]}:{file.name}')
        if spoken not in task.languages:
            raise EdgemedError(f"{where}: task {task.name} has no language '{spoken}'", nearest(str(spoken), task.languages))
        try:
            example = task.example({**row, "language": spoken})
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
            raise EdgemedError(f"{where}: not a {task.name} row ({reason})", f"Compare with tasks/samples/{task.sample}") from None
        if example.id in seen:
            raise EdgemedError(f"{where}: id '{example.id}' occurs twice", "Give every row its own id")
        _check_options(example, task, where)
        seen.add(example.id)
        if not language or spoken == language:
            examples.append(example)
    if not examples:
        raise EdgemedError(f"task file {file} has no rows in '{language}'" if seen else f"task file {file} is empty", "Give at least one row")
    return tuple(examples)


def _check_options(example: Example, task: Task, where: str) -> None:
    options = example.options
    if len(options) < 2 or not 0 <= example.gold < len(options):
        raise EdgemedError(f"{where}: {len(options)} options, gold answer number {example.gold}", "Two or more options, and gold among them")
    if task.lettered and len(options) > len(LETTERS):
        raise EdgemedError(f"{where}: {len(options)} options, and {task.name} lists them under letters", f"Give at most {len(LETTERS)}")
    for number, option in enumerate(options, 1):
        if not isinstance(option, str) or not option.strip():
            raise EdgemedError(f"{where}: option {number} is {'empty' if isinstance(option, str) else 'not a text'}", "Give every option a text")
    # Under letters two like options are still two answers, and the official MedMCQA has 21 such rows; scored by their texts they are one.
    twice, times = Counter(option.strip() for option in options).most_common(1)[0]
    if times > 1 and not task.lettered:
        raise EdgemedError(f"{where}: two options are the same ('{twice[:60]}')", "Correct the row or leave it out")
    try:
        "".join((example.question, *options)).encode()
    except UnicodeEncodeError as error:
        raise EdgemedError(f"{where}: half a character (surrogate {error.object[error.start]!a})", "Write the row again in valid Unicode") from None


def _plain(example: Example) -> str:
    return " ".join(example.question.split()).casefold()
