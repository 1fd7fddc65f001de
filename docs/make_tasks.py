"""Writes docs/tasks.md from the task files and the cards of their samples: python
docs/make_tasks.py

A table that is written by hand is wrong after the next change; a test compares this one with the
tasks themselves.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from edgemed import plugins
from edgemed.evaluation.task import Task, questions

PAGE = Path(__file__).parent / "tasks.md"
HEAD = """# Tasks

Written by `make docs` from `edgemed/tasks/` and the cards in `edgemed/tasks/samples/`; a test keeps it current.

Ask for a task as `NAME[/LANGUAGE or /PART][:FILE.jsonl]`: `medqa` is the shipped sample, `headqa/es` its Spanish half, `worldmedqa/he:mine.jsonl` a file of your own. Samples are shuffled with a seed, so the first rows
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

## Tasks with images

    {"id": "1", "image": "scan.png", "question": "...", "options": ["...", "..."], "answer": 1}

`image` (or `images`, a list) names a file beside the rows' file, or a member of the task's zip file there; PNG, JPEG, TIFF and what else Pillow reads, and as a file beside it DICOM. A missing one is refused with the row's number
when the task is read, a damaged one when it is opened. Sets that are published as one `.json` list work by path too. The key of a result covers the images' bytes.

Where the data cannot be passed on, the sample is **synthetic**: drawn shapes in the set's layout, to test an installation; its accuracy says nothing. The table names where the real data goes.

- The prompt is the family's chat form. Under letters the options stand as `A) ...` lines, inside the instructions of a reasoning fine-tune where the family has some; other questions ask for a single word or phrase.
- `scoring: generated` writes greedily, at most `rationale` tokens of reasoning (MedVLM-R1 was evaluated with 512 in all: set `eval.rationale` to 480) and 32 for the answer, which is read as the family does; no answer is wrong and
  counted in `unparsed`. `sum` compares the letters right behind the family's answer mark (`<answer>A`), without reasoning: far cheaper, and another measurement.
- Open questions have no options: the model always writes, and an exact match (case, punctuation and articles aside) is right. They count in the accuracy and in the paired statistics like any other; a change between two wrong
  wordings is a changed answer.
- Nothing of a prompt with images is ever cut: half an image is another image. One that does not fit ends the evaluation with the question's id and both lengths.
- Strategies: zero-shot and vote-N. Solved examples and `cot` are for text.
- `scores` of a result holds a set's own metrics, each with its number of questions. vqa_rad, slake and pathvqa: `closed_accuracy` (whole words: the option named first), `open_exact`, `open_recall` (share of the reference's words), and as
  the papers computed them `legacy_closed` (the reference anywhere in the answer: "no" is found in "normal"; Med-MoE) and `legacy_open` (LLaVA-Med's recall, which repeated words raise). mediconfusion: `set_accuracy`
  (both of a pair right) and `confusion` (one answer for both).
- `vqa_rad` asks the official test questions, most of whose images are in training; `vqa_rad/image_disjoint` those about images that are not.
"""


def row(name: str) -> str:
    task: Task = plugins.load("tasks", name).TASK
    card = yaml.safe_load(
        (plugins.ROOT / "tasks" / "samples" / f"{Path(task.sample).stem}.card.yaml").read_text(
            encoding="utf-8"
        )
    )
    sets = card.get("whole_set", [])
    whole = (
        "<br>".join(
            f"`{part['path']}` ({part['n']:,})"
            for part in (sets if isinstance(sets, list) else [sets])
        )
        or task.place
    )
    rows = f"{card['n']}{' synthetic' if card.get('synthetic') else ''}"
    shots = f"{card['shots']['n']}" if task.shots else "none"
    asked = ", ".join((*task.languages, *(f"part {part}" for part in task.parts)))
    cells = (
        f"`{name}`",
        asked,
        task.source,
        task.licence,
        task.split,
        task.wording,
        rows,
        shots,
        whole,
    )
    return f"| {' | '.join(cells)} |"


def prompt(name: str) -> list[str]:
    task: Task = plugins.load("tasks", name).TASK
    groups = ", ".join(questions(name, 1).examples[0].groups) or "none"
    scored = (
        "the letters"
        if task.lettered
        else (
            "the options' texts"
            if not task.scores
            else "yes and no; other answers are written and matched"
        )
    )
    if task.images:
        scored += "; an image is shown"
    lines = (task.description + task.prompt).split("\n")
    return [
        "",
        f"### {name}",
        "",
        f"Scored: {scored}. Subgroups: {groups}.",
        "",
        *(f"    {line}".rstrip() for line in lines),
    ]


def page() -> str:
    names = plugins.names("tasks")
    parts = [
        HEAD,
        (
            "| task | languages, parts | source | licence | split | wording | sample | solved"
            " examples | whole set (rows) |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
        *map(row, names),
    ]
    parts += [
        "",
        (
            "Paths of whole sets are relative to the folder given to `make_samples.py --data`;"
            " their sha256 and what was changed stand in the cards."
        ),
        "",
        "## Prompts",
    ]
    for name in names:
        parts += prompt(name)
    return "\n".join(parts) + "\n" + ROWS


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
