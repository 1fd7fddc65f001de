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

`make docs` writes this page from `edgemed/tasks/` and the cards in `edgemed/tasks/samples/`. A test keeps it current.

Name a task as `NAME[/LANGUAGE or /PART][:FILE.jsonl]`:

- `medqa` is the shipped sample.
- `headqa/es` is the Spanish half of one.
- `worldmedqa/he:mine.jsonl` is a file of your own.

Samples are shuffled with a seed, so the first rows (`--limit`) are as mixed as the whole. `bench/tasks/make_samples.py` cuts them again from the whole public sets. `--whole OUT` writes those in the layout that works by path.

The samples are for comparing an engine with its source. For numbers to put beside published ones, evaluate the whole split.
Prompts are worded as in lm-evaluation-harness 0.4.13 where it has the task. `bench/lm_eval_parity.py` compares prompts and scores with it item by item ([lm-eval.md](lm-eval.md)).

Solved examples for few-shot prompts are of another split where one was at hand. For medqa, medmcqa and worldmedqa none was: theirs are rows of the evaluated split that the sample does not hold.
A question that is asked is never shown solved. So few-shot strategies have none left over those whole splits.
"""
ROWS = """
## What a row looks like

    {"id": "1", "question": "...", "options": {"A": "...", "B": "..."}, "answer": "B", "subject": "anatomy", "language": "en"}

- `options` may be a list, and `answer` an index from 0.
- `language` is needed only where a task knows several and none is asked for.
- `subject` and `country` become the subgroups of the accuracy table.
- pubmedqa has `contexts` (a list of paragraphs) and the answers yes, no and maybe. pubmedqa_conclusion has `long_answer` in place of `contexts`. section has `passage`.
- Files are UTF-8. A byte-order mark is skipped.

Refused, with the row's number:

- an empty file;
- a field missing or blank;
- an id that occurs twice;
- fewer than two options, or an empty option;
- two options that are the same where they are scored by their texts (under letters they can be told apart);
- more than 26 options where they are listed under letters;
- an answer outside the options;
- a language the task does not know.

## Tasks with images

    {"id": "1", "image": "scan.png", "question": "...", "options": ["...", "..."], "answer": 1}

- `image` (or `images`, a list) names a file beside the rows' file, or a member of the task's zip file there.
- Formats are PNG, JPEG, TIFF and what else Pillow reads. DICOM is read as a file beside the rows.
- A missing image is refused with the row's number when the task is read. A damaged one is refused when it is opened.
- Sets that are published as one `.json` list work by path too.
- The key of a result covers the images' bytes.

Where the data cannot be passed on, the sample is **synthetic**: drawn shapes in the set's layout, to test an installation. Its accuracy says nothing. The table names where the real data goes.

- **Prompt.** The prompt is the family's chat form. Under letters the options stand as `A) ...` lines, inside the instructions of a reasoning fine-tune where the family has some. Other questions ask for a single word or phrase.
- **`scoring: generated`** writes greedily, at most `rationale` tokens of reasoning and 32 for the answer. MedVLM-R1 was evaluated with 512 in all: set `eval.rationale` to 480. The answer is read as the family does. No answer is wrong and counted in `unparsed`.
- **`sum`** compares the letters right behind the family's answer mark (`<answer>A`), without reasoning. It is far cheaper, and another measurement.
- **Open questions** have no options. The model always writes, and an exact match (case, punctuation and articles aside) is right. They count in the accuracy and in the paired statistics like any other. A change between two wrong wordings is a changed answer.
- **Length.** Nothing of a prompt with images is ever cut: half an image is another image. One that does not fit ends the evaluation with the question's id and both lengths.
- **Strategies**: zero-shot and vote-N. Solved examples and `cot` are for text.
- **Parts.** `vqa_rad` asks the official test questions, most of whose images are in training. `vqa_rad/image_disjoint` asks those about images that are not.

`scores` of a result holds a set's own metrics, each with its number of questions:

| task | score | what it is |
|---|---|---|
| vqa_rad, slake, pathvqa | `closed_accuracy` | whole words: the option named first |
| | `open_exact` | exact match |
| | `open_recall` | share of the reference's words |
| | `legacy_closed` | as the papers computed it: the reference anywhere in the answer, so that "no" is found in "normal" (Med-MoE) |
| | `legacy_open` | as the papers computed it: LLaVA-Med's recall, which repeated words raise |
| mediconfusion | `set_accuracy` | both of a pair right |
| | `confusion` | one answer for both |
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
