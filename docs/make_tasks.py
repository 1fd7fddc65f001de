"""Writes docs/tasks.md from the task files and the cards of their samples: python docs/make_tasks.py

A table that is written by hand is wrong after the next change; a test compares this one with the tasks themselves.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from edgemed import plugins
from edgemed.task import Task, questions

PAGE = Path(__file__).parent / "tasks.md"
HEAD = """# Tasks

Written by `make docs` from `edgemed/tasks/` and the cards in `edgemed/tasks/samples/`; a test keeps it current.

Ask for a task as `NAME[/LANGUAGE][:FILE.jsonl]`: `medqa` is the shipped sample, `headqa/es` its Spanish half, `worldmedqa/he:mine.jsonl` a file of your own. Samples are shuffled with a seed, so the first rows
(`--limit`) are as mixed as the whole. `bench/tasks/make_samples.py` cuts them again from the whole public sets, and `--whole OUT` writes those in the layout that works by path.

The samples are for comparing an engine with its source. For numbers to put beside published ones, evaluate the whole split. Prompts are worded as in lm-evaluation-harness 0.4.13 where it has the task;
`bench/lm_eval_parity.py` compares prompts and scores with it item by item ([lm-eval.md](lm-eval.md)).

Solved examples for few-shot prompts are of another split where one was at hand. For medqa, medmcqa and worldmedqa it was not: theirs are rows of the evaluated split that the sample does not hold, and since a question that
is asked is never shown solved, few-shot strategies have none left over those whole splits.
"""
ROWS = """
## What a row looks like

    {"id": "1", "question": "...", "options": {"A": "...", "B": "..."}, "answer": "B", "subject": "anatomy", "language": "en"}

`options` may be a list, and `answer` an index from 0. `language` is needed only where a task knows several and none is asked for; `subject` and `country` become the subgroups of the accuracy table. pubmedqa has
`contexts` (a list of paragraphs) and the answers yes, no and maybe; section has `passage`. Files are UTF-8, a byte-order mark is skipped. Refused, with the row's number: an empty file, a field missing or blank, an id that
occurs twice, fewer than two options, an empty option, two options that are the same where they are scored by their texts (under letters they can be told apart), more than 26 where they are listed under letters,
an answer outside the options, a language the task does not know.
"""


def row(name: str) -> str:
    task: Task = plugins.load("tasks", name).TASK
    card = yaml.safe_load((plugins.ROOT / "tasks" / "samples" / f"{Path(task.sample).stem}.card.yaml").read_text(encoding="utf-8"))
    sets = card["whole_set"] if isinstance(card["whole_set"], list) else [card["whole_set"]]
    whole = "<br>".join(f"`{part['path']}` ({part['n']:,})" for part in sets)
    cells = (f"`{name}`", ", ".join(task.languages), task.source, task.licence, task.split, task.wording, f"{card['n']}", f"{card['shots']['n']}", whole)
    return f"| {' | '.join(cells)} |"


def prompt(name: str) -> list[str]:
    task: Task = plugins.load("tasks", name).TASK
    groups = ", ".join(questions(name, 1).examples[0].groups) or "none"
    scored = "the letters" if task.lettered else "the options' texts"
    lines = (task.description + task.prompt).split("\n")
    return ["", f"### {name}", "", f"Scored: {scored}. Subgroups: {groups}.", "", *(f"    {line}".rstrip() for line in lines)]


def page() -> str:
    names = plugins.names("tasks")
    parts = [HEAD, "| task | languages | source | licence | split | wording | sample | solved examples | whole set (rows) |", "|---|---|---|---|---|---|---|---|---|", *map(row, names)]
    parts += ["", "Paths of whole sets are relative to the folder given to `make_samples.py --data`; their sha256 and what was changed stand in the cards.", "", "## Prompts"]
    for name in names:
        parts += prompt(name)
    return "\n".join(parts) + "\n" + ROWS


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
