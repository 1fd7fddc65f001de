"""An evaluation task: rows of a JSONL file turned into questions with options, and the facts that
go with them.

A task file states source, licence, split, metric and prompt once; a user's own data in the same
layout works by path.
"""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed import plugins
from edgemed.artifacts.hashing import digest, file_sha256
from edgemed.data.text_sets import read_rows
from edgemed.documents.evaluation import Item, Score
from edgemed.documents.yaml_files import read_yaml_mapping
from edgemed.errors import EdgemedError, nearest
from edgemed.params import in_short
from edgemed.vision.image_io import Album

if TYPE_CHECKING:
    from PIL import Image

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Example:
    """One question. question: what is asked, the options not in it; options: their texts as a
    person reads them; gold indexes options.

    groups: by what accuracy is shown besides, e.g. {'subject': 'anatomy', 'language': 'en'}.
    images: their names, in the order the model sees them. reference: the right answer of an open
    question, which has no options and gold 0; the model writes, and an exact match
    (answer_matching.py) is right.
    """

    id: str
    question: str
    options: tuple[str, ...]
    gold: int
    groups: Mapping[str, str] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    reference: str = ""


@dataclass(frozen=True)
class Prompt:
    """What a model reads. options: one continuation of `context` per option, appended as it is (so
    each starts with a space, but where the context ends as an image question's does: with what a
    conversation template puts in front of an answer).
    """

    context: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What a file in tasks/ defines. example(row) -> Example; it may raise KeyError or ValueError
    for a malformed row.

    render(example) -> Prompt. prompt: the same wording, for people. wording: whose it is.
    languages: those a row may name. lettered: render lists the options under letters and asks for
    one. shots: a file beside the sample with solved examples for few-shot prompts, none of them
    from the evaluated rows. description: what stands before everything else in the prompt; a
    group's name in braces stands for the example's (see describe). images: a zip file beside the
    rows that holds the images, which may as well lie there as files. place: how to get real data
    that cannot be shipped. parts: name -> which rows belong to it; the first is what is asked where
    none is named. scores(pairs) -> name -> Score, share and number of questions of it,
    from (example, its item in a result): metrics of the task's own beside accuracy.
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
    images: str = ""
    place: str = ""
    parts: Mapping[str, Callable[[Mapping[str, Any]], bool]] = field(default_factory=dict)
    scores: Callable[[Sequence[tuple[Example, Item]]], dict[str, Score]] | None = None


@dataclass(frozen=True)
class Questions:
    """The examples of a task, and the sha256 of the file they came from: results on different files
    are never paired.

    language: the one asked for, None for all; part: the same of a task's parts; synthetic: a
    stand-in for data that cannot be shipped; file: the name of a user's own file, None where the
    rows are the shipped sample or the published set. key: digest of the file and of every word and
    image a model is shown, solved examples included; results with different keys are never paired.
    shots: solved examples, none of whose questions is asked.
    """

    task: Task
    sha256: str
    examples: tuple[Example, ...]
    language: str | None = None
    key: str = ""
    shots: tuple[Example, ...] = ()
    album: Album | None = None
    part: str | None = None
    synthetic: bool = False
    file: str | None = None

    @property
    def has_vision(self) -> bool:
        """Whether any question shows an image."""
        return any(example.images for example in self.examples)

    def pictures(self, example: Example) -> list[Image.Image]:
        """The images of one of the examples, RGB. Raises EdgemedError for a damaged one, naming the
        question.
        """
        if self.album is None:
            raise EdgemedError(
                f"question {example.id} shows images, and these questions came without their files",
                "Read them with task.questions",
            )
        try:
            return [self.album.open(name) for name in example.images]
        except EdgemedError as error:
            raise EdgemedError(f"question {example.id}: {error.problem}", error.fix) from None


def text(row: Mapping[str, Any], name: str) -> str:
    """A field that must hold words. Raises KeyError or ValueError."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"'{name}' is blank" if isinstance(value, str) else f"'{name}' is not a text"
        )
    return value


def multiple_choice(row: Mapping[str, Any], *groups: str) -> Example:
    """The usual layout: {"id", "question", "options": {"A": text, ...} or [text, ...], "answer":
    letter, or index from 0}.

    groups: fields that become groups where the row has them. Raises KeyError or ValueError.
    """
    options = row["options"]
    answer = row["answer"]
    if not isinstance(options, (Mapping, list)):
        raise ValueError("'options' is neither a mapping nor a list")
    names = list(options) if isinstance(options, Mapping) else list(LETTERS[: len(options)])
    texts = tuple(options.values()) if isinstance(options, Mapping) else tuple(options)
    if answer in names:
        gold = names.index(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool):
        gold = answer
    else:
        raise ValueError(
            f"the answer {in_short(answer)} is none of the {len(texts)} options"
            f" {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        )
    return Example(
        str(row["id"]),
        text(row, "question"),
        texts,
        gold,
        {name: text(row, name) for name in groups if name in row},
    )


def image_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """ "image": a name, or "images": several. Raises KeyError or ValueError."""
    names = row["images"] if "images" in row else [row["image"]]
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise ValueError(
            "'image' is not a name" if "images" not in row else "'images' is not a list of names"
        )
    return tuple(names)


def choice(row: Mapping[str, Any], options: tuple[str, ...]) -> int:
    """Which of a task's fixed options "answer" names. Raises KeyError or ValueError."""
    if row["answer"] not in options:
        raise ValueError(f"the answer {in_short(row['answer'])} is none of {', '.join(options)}")
    return options.index(row["answer"])


def worded(row: Mapping[str, Any], question: str, options: tuple[str, ...]) -> Example:
    """A row whose "answer" is one of a task's fixed options. Raises KeyError or ValueError."""
    return Example(
        str(row["id"]),
        question,
        options,
        choice(row, options),
        {"answer": row["answer"]},
    )


def worded_prompt(example: Example, ending: str) -> Prompt:
    """A question whose options are the words that may follow `ending`."""
    return Prompt(f"{example.question}\n{ending}", tuple(f" {word}" for word in example.options))


def task_description(task: Task, example: Example) -> str:
    """What stands before everything else in this example's prompt: 'The following are ... about
    anatomy.'
    """
    return task.description.format_map(example.groups)


def questions(spec: str, limit: int | None = None, frame: int | None = None) -> Questions:
    """The examples of NAME[/LANGUAGE or /PART][:FILE.jsonl]: 'pubmedqa' (the shipped sample),
    'headqa/es', 'worldmedqa/he:mine.jsonl' (a user's own rows).

    limit: only the first rows of that language or part (shipped samples are shuffled). frame: the
    one, from 0, that stands for an image file of several; None where such a file is refused. Raises
    EdgemedError for an unknown name, language or part, an empty file, a malformed row, a duplicate
    id, fewer than two options, an empty option, two that cannot be told apart, a gold answer
    outside them, or an image that is not there.
    """
    head, colon, path = spec.partition(":")
    name, slash, asked_for = head.partition("/")
    task: Task = plugins.load("tasks", name).TASK
    if slash and asked_for not in (*task.languages, *task.parts):
        what = "part" if task.parts else "language"
        choices = (*task.parts, *task.languages)
        raise EdgemedError(f"task {name} has no {what} '{asked_for}'", nearest(asked_for, choices))
    language = asked_for if asked_for in task.languages else ""
    part = None
    if task.parts:
        part = asked_for if asked_for in task.parts else next(iter(task.parts))
    folder = plugins.ROOT / "tasks" / "samples"
    file = Path(path) if colon else folder / task.sample
    if not file.is_file():
        raise EdgemedError(
            f"task file {path or repr(path)} does not exist",
            f"Give {head}:FILE.jsonl in the layout of tasks/samples/{task.sample}",
        )
    if limit is not None and limit < 1:
        raise EdgemedError(f"a limit of {limit} questions leaves none", "Give 1 or more")
    album = Album(file.parent, task.images, frame)
    examples = _examples(file, task, language, part, album)[:limit]
    wordings = {_plain(example) for example in examples}
    shots: tuple[Example, ...] = ()
    if task.shots:
        solved = _examples(folder / task.shots, task, language, None, album)
        shots = tuple(shot for shot in solved if _plain(shot) not in wordings)
    sha256 = file_sha256(file)
    words = [_words_shown(task, example) for example in (*examples, *shots)]
    key_parts: dict[str, Any] = {
        "file": sha256,
        "task": name,
        "language": language or None,
        "n": len(examples),
        "shown": words,
    }
    if any(example.images for example in examples):
        key_parts["images"] = [_image_digests(album, example) for example in examples]
        if frame is not None:
            key_parts["frame"] = frame
    return Questions(
        task=task,
        sha256=sha256,
        examples=examples,
        language=language or None,
        key=digest(key_parts),
        shots=shots,
        album=album,
        part=part,
        synthetic=bool(task.place) and not colon,
        file=None if sha256 in published_hashes(name) else file.name,
    )


def published_hashes(name: str) -> tuple[str, ...]:
    """sha256 of the files that may be called by a task's name: its shipped sample and, where the
    task's card knows it, the whole published set.
    """
    folder = plugins.ROOT / "tasks" / "samples"
    hashes = []
    for sample in folder.glob(f"{name}.json*"):
        hashes.append(file_sha256(sample))
    card = folder / f"{name}.card.yaml"
    if card.is_file():
        facts = read_yaml_mapping(card, "Install edgemed again")
        whole = facts.get("whole_set", [])
        parts = whole if isinstance(whole, list) else [whole]
        hashes += [facts["sha256"], *(part["sha256"] for part in parts)]
    return tuple(hashes)


def _words_shown(task: Task, example: Example) -> list[Any]:
    """Every word of an example that a model is shown or judged by. It is part of the task's key."""
    prompt = task.render(example)
    words = [task_description(task, example), prompt.context, prompt.options, example.gold]
    if example.reference:
        words.append(example.reference)
    return words


def _image_digests(album: Album, example: Example) -> list[str]:
    return [hashlib.sha256(album.read(image)).hexdigest() for image in example.images]


def _examples(
    file: Path, task: Task, language: str, part: str | None, album: Album
) -> tuple[Example, ...]:
    examples = []
    seen = set()
    elsewhere = False
    for number, row in enumerate(read_rows(file), 1):
        where = f"{file} row {number}"
        spoken = (
            row.get("language")
            or language
            or (task.languages[0] if len(task.languages) == 1 else None)
        )
        if spoken is None:
            raise EdgemedError(
                f"{where} names no language",
                f'Add "language", or ask for one, e.g. {task.name}/{task.languages[0]}:{file.name}',
            )
        if spoken not in task.languages:
            raise EdgemedError(
                f"{where}: task {task.name} has no language '{spoken}'",
                nearest(str(spoken), task.languages),
            )
        try:
            if part and not task.parts[part](row):
                elsewhere = True
                continue
            example = task.example({**row, "language": spoken})
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
            raise EdgemedError(
                f"{where}: not a {task.name} row ({reason})",
                f"Compare with tasks/samples/{task.sample}",
            ) from None
        if example.id in seen:
            raise EdgemedError(
                f"{where}: id '{example.id}' occurs twice", "Give every row its own id"
            )
        _check_id(row, where)
        _check_options(example, task, where)
        if not example.images and (row.get("image") or row.get("images")):
            raise EdgemedError(
                f"{where} names an image, and task {task.name} shows none",
                "Take a task about images, or leave the image out",
            )
        for image in example.images:
            if not album.has(image):
                beside = f", or as a member of {task.images}" if task.images else ""
                raise EdgemedError(
                    f"{where}: image '{image}' is not there",
                    "Put it under that name in"
                    f" {file.parent}{beside}{'. ' if task.place else ''}{task.place}",
                )
        seen.add(example.id)
        if not language or spoken == language:
            examples.append(example)
    if not examples:
        raise EdgemedError(
            (
                f"task file {file} has no rows in '{language or part}'"
                if seen or elsewhere
                else f"task file {file} is empty"
            ),
            "Give at least one row",
        )
    return tuple(examples)


def _check_id(row: Mapping[str, Any], where: str) -> None:
    if isinstance(row.get("id", ""), bool) or not isinstance(row.get("id", ""), (str, int)):
        raise EdgemedError(
            f"{where}: id {in_short(row['id'])} is neither a text nor a whole number",
            "Give every row its own id",
        )


def _check_options(example: Example, task: Task, where: str) -> None:
    options = example.options
    if example.reference and not options:
        return
    if len(options) < 2 or not 0 <= example.gold < len(options):
        raise EdgemedError(
            f"{where}: {len(options)} options, gold answer number {example.gold}",
            "Two or more options, and gold among them",
        )
    if task.lettered and len(options) > len(LETTERS):
        raise EdgemedError(
            f"{where}: {len(options)} options, and {task.name} lists them under letters",
            f"Give at most {len(LETTERS)}",
        )
    for number, option in enumerate(options, 1):
        if not isinstance(option, str) or not option.strip():
            raise EdgemedError(
                f"{where}: option {number} is"
                f" {'empty' if isinstance(option, str) else 'not a text'}",
                "Give every option a text",
            )
    # Under letters two like options are still two answers, and the official MedMCQA has 21 such
    # rows; scored by their texts they are one.
    twice, times = Counter(option.strip() for option in options).most_common(1)[0]
    if times > 1 and not task.lettered:
        raise EdgemedError(
            f"{where}: two options are the same ('{twice[:60]}')", "Correct the row or leave it out"
        )


def _plain(example: Example) -> str:
    return " ".join(example.question.split()).casefold()
