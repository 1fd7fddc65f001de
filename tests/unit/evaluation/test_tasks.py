"""Task files as users write them: the spec, languages, layouts that are accepted, and everything
that is refused with one clear line.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from edgemed import plugins
from edgemed.data.text_sets import read_jsonl
from edgemed.documents.evaluation import task_title
from edgemed.errors import EdgemedError
from edgemed.evaluation.task import Prompt, Questions, questions, task_description
from edgemed.provenance import record

ROW = {
    "id": "1",
    "question": "Which organ pumps blood?",
    "options": {"A": "Liver", "B": "Heart", "C": "Lung"},
    "answer": "B",
}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return file


def refused(spec: str, said: str, limit: int | None = None) -> None:
    with pytest.raises(EdgemedError) as caught:
        questions(spec, limit)
    message = str(caught.value)
    assert said in message, message
    assert "\n" not in message, message
    assert caught.value.fix, message


def prompt(asked: Questions, index: int = 0) -> str:
    example = asked.examples[index]
    return task_description(asked.task, example) + asked.task.render(example).context


# --- what is accepted


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "options": ["Liver", "Heart", "Lung"]},
        {**ROW, "answer": 1},
        {**ROW, "options": ["Liver", "Heart", "Lung"], "answer": 1},
        {**ROW, "id": 1, "language": "en", "unknown": "kept out"},
        {**ROW, "options": {"1": "Liver", "2": "Heart", "3": "Lung"}, "answer": "2"},
    ],
)
def test_layouts(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = questions(f"medqa:{write(tmp_path, row)}").examples
    assert (example.id, example.options, example.gold) == ("1", ("Liver", "Heart", "Lung"), 1)
    assert (
        prompt(questions(f"medqa:{write(tmp_path, row)}"))
        == "Question: Which organ pumps blood?\nA. Liver\nB. Heart\nC. Lung\nAnswer:"
    )


def test_wordings_by_hand(tmp_path: Path) -> None:
    file = write(tmp_path, {**ROW, "subject": "anatomy", "language": "en", "id": "brazil-3"})
    said = {
        name: prompt(questions(f"{name}:{file}"))
        for name in ("medmcqa", "mmlu_medical", "headqa", "worldmedqa")
    }
    listed = "A. Liver\nB. Heart\nC. Lung\nAnswer:"
    assert said["medmcqa"] == f"Question: Which organ pumps blood?\nChoices:\n{listed}"
    assert (
        said["mmlu_medical"]
        == "The following are multiple choice questions (with answers) about anatomy.\n\nWhich"
        f" organ pumps blood?\n{listed}"
    )
    assert said["headqa"] == "Question: Which organ pumps blood?\nAnswer:"
    assert said["worldmedqa"] == f"Question: Which organ pumps blood?\n{listed}"
    headqa = questions(f"headqa:{file}")
    medqa = questions(f"medqa:{file}")
    assert headqa.task.render(headqa.examples[0]).options == (
        " Liver",
        " Heart",
        " Lung",
    )
    assert medqa.task.render(medqa.examples[0]).options == (" A", " B", " C")
    assert questions(f"worldmedqa:{file}").examples[0].groups == {
        "country": "brazil",
        "language": "en",
    }
    assert questions(
        f"mmlu_medical:{write(tmp_path, {**ROW, 'id': 'mmlu/college_biology-017'})}"
    ).examples[0].groups == {"subject": "college biology"}


def test_marks_and_line_separators_inside_texts(tmp_path: Path) -> None:
    odd = {**ROW, "question": "One\u2028two\u0085three"}
    text = json.dumps(odd, ensure_ascii=False)
    file = tmp_path / "bom.jsonl"
    file.write_bytes(f"\ufeff{text}\r\n\ufeff{text.replace('One', 'Uno')}\r\n\r\n".encode())
    assert [row["question"] for row in read_jsonl(file)] == [
        "One\u2028two\u0085three",
        "Uno\u2028two\u0085three",
    ]


def test_thousands_of_options_where_they_are_scored_by_text(tmp_path: Path) -> None:
    many = {
        **ROW,
        "options": [f"option {n}" for n in range(5000)],
        "answer": 4321,
        "language": "en",
    }
    file = write(tmp_path, many)
    started = time.perf_counter()
    assert questions(f"headqa:{file}").examples[0].gold == 4321
    assert time.perf_counter() - started < 2
    refused(
        f"medqa:{file}", "row 1: 5000 options, and medqa lists them under letters. Give at most 26"
    )
    assert (
        len(
            questions(
                f"medqa:{write(tmp_path, {**many, 'options': many['options'][:26], 'answer': 'Z'})}"
            )
            .examples[0]
            .options
        )
        == 26
    )


# --- languages, limit, key, solved examples


def test_languages(tmp_path: Path) -> None:
    spanish = questions("headqa/es")
    english = questions("headqa/en")
    assert spanish.language == "es"
    assert {e.groups["language"] for e in (*spanish.examples, *spanish.shots)} == {"es"}
    both = questions("headqa")
    assert both.language is None
    assert len(both.examples) == len(spanish.examples) + len(english.examples)
    silent = write(tmp_path, ROW)
    hebrew = {**ROW, "id": "2", "language": "he"}
    assert questions(f"worldmedqa/ja:{silent}").examples[0].groups == {"language": "ja"}
    mixed = write(tmp_path, hebrew, {**ROW, "language": "pt"}, name="mixed.jsonl")
    assert [e.id for e in questions(f"worldmedqa/he:{mixed}").examples] == ["2"]
    refused("headqa/fr", "task headqa has no language 'fr'. Known: en, es")
    refused("worldmedqa/jp", "Known: en, es, he, ja, pt")
    refused("headqa/", "has no language ''")
    refused(f"worldmedqa:{silent}", "row 1 names no language")
    refused(f"medqa:{mixed}", "row 1: task medqa has no language 'he'")
    refused(
        f"headqa:{write(tmp_path, {**ROW, 'language': 'esp'}, name='c.jsonl')}",
        "row 1: task headqa has no language 'esp'. Did you mean 'es'?",
    )
    refused(f"worldmedqa/es:{mixed}", "has no rows in 'es'")


def test_limit_takes_the_first_rows_and_they_are_mixed() -> None:
    first = questions("mmlu_medical", 60)
    all_of_it = questions("mmlu_medical")
    assert first.examples == all_of_it.examples[:60]
    assert len({e.groups["subject"] for e in first.examples}) == 6
    assert len({e.groups["subject"] for e in questions("medmcqa", 100).examples}) >= 15
    assert {e.groups["language"] for e in questions("worldmedqa", 40).examples} == {
        "pt",
        "he",
        "ja",
        "es",
        "en",
    }
    refused("medqa", "a limit of 0 questions leaves none", 0)


def test_key_names_everything_a_model_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [
        questions(*spec).key
        for spec in (
            ("headqa",),
            ("headqa", 5),
            ("headqa/es",),
            ("medqa",),
            (f"medqa:{write(tmp_path, ROW)}",),
        )
    ]
    assert len(set(keys)) == 5
    assert all(len(key) == 64 for key in keys)
    assert questions("headqa").key == keys[0]
    module = plugins.load("tasks", "medqa")
    for changes in (
        {"description": "Answer. "},
        {"shots": ""},
        {"render": lambda example: Prompt("other", (" x",))},
    ):
        other = type(module.TASK)(**{**module.TASK.__dict__, **changes})
        monkeypatch.setattr(module, "TASK", other)
        assert questions("medqa").key != keys[3], changes
        monkeypatch.undo()


def test_solved_examples_that_are_asked_are_dropped(tmp_path: Path) -> None:
    shot = questions("medqa").shots[0]
    mine = {**ROW, "question": f"  {shot.question.upper()} ", "id": "mine"}
    left = questions(f"medqa:{write(tmp_path, ROW, mine)}").shots
    assert shot not in left
    assert len(left) == len(questions("medqa").shots) - 1
    assert shot in questions(f"medqa:{write(tmp_path, ROW, mine)}", 1).shots, (
        "the second row is not asked"
    )


# --- what is refused


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "is empty"),
        (["", "  "], "is empty"),
        ([ROW, ROW], "row 2: id '1' occurs twice"),
        (
            [ROW, {**ROW, "id": "2", "answer": "E"}],
            "row 2: not a medqa row (the answer 'E' is none of the 3 options A, B, C)",
        ),
        ([{**ROW, "answer": 3}], "row 1: 3 options, gold answer number 3"),
        ([{**ROW, "answer": -1}], "gold answer number -1"),
        ([{**ROW, "answer": True}], "the answer True is none of"),
        ([{**ROW, "answer": ["B"]}], "the answer ['B'] is none of"),
        (
            [{**ROW, "options": {"B": "Heart"}}],
            "row 1: 1 options, gold answer number 0. Two or more options",
        ),
        ([{**ROW, "options": []}], "is none of the 0 options"),
        ([{**ROW, "options": "Heart"}], "'options' is neither a mapping nor a list"),
        ([{**ROW, "options": {"A": "Liver", "B": " "}}], "row 1: option 2 is empty"),
        ([{**ROW, "options": [1, 2], "answer": "A"}], "row 1: option 1 is not a text"),
        ([{**ROW, "question": " \n"}], "'question' is blank"),
        ([{**ROW, "question": None}], "'question' is not a text"),
        (
            [{key: ROW[key] for key in ("id", "question", "options")}],
            "row 1: not a medqa row ('answer' is missing)",
        ),
        (
            [ROW, {key: ROW[key] for key in ("question", "options", "answer")}],
            "row 2: not a medqa row ('id' is missing)",
        ),
        (['{"id": "1"'], "line 1 is not JSON"),
        (["[1, 2]"], "line 1 is not a JSON object"),
        (
            [{**ROW, "question": "half \ud83d a character"}],
            "line 1 is not JSON (half a character (surrogate '\\ud83d'))",
        ),
    ],
)
def test_refused_rows(tmp_path: Path, rows: list[Any], said: str) -> None:
    refused(f"medqa:{write(tmp_path, *rows)}", said)


def test_options_that_cannot_be_told_apart(tmp_path: Path) -> None:
    same = {**ROW, "options": ["Heart", "Liver", "Heart "], "answer": 0, "language": "en"}
    refused(f"headqa:{write(tmp_path, same)}", "row 1: two options are the same ('Heart')")
    assert questions(f"medqa:{write(tmp_path, same)}").examples[0].gold == 0, (
        "under letters they are two answers"
    )


def test_refused_rows_of_tasks_with_fixed_options(tmp_path: Path) -> None:
    good = {"id": "1", "question": "Is it?", "contexts": ["It is."], "answer": "yes"}
    assert len(questions(f"pubmedqa:{write(tmp_path, good)}").examples) == 1
    for changes, said in (
        ({"contexts": "It is."}, "'contexts' is not a list"),
        ({"contexts": []}, "'contexts' is not a list"),
        ({"answer": "YES"}, "'YES' is none of yes, no, maybe"),
        ({"question": ""}, "'question' is blank"),
    ):
        refused(f"pubmedqa:{write(tmp_path, {**good, **changes})}", said)
    refused(
        f"section:{write(tmp_path, {'id': '1', 'passage': 'p', 'answer': 'aims'})}",
        "'aims' is none of background, methods",
    )
    refused(
        f"mmlu_medical:{write(tmp_path, {**ROW, 'subject': 'law'})}",
        "the subject 'law' is none of anatomy",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(ROW).encode("utf-16"), "line 1 is not UTF-8"),
        (
            (json.dumps(ROW) + "\n").encode()
            + json.dumps({**ROW, "id": "2", "question": "Où ?"}, ensure_ascii=False).encode(
                "latin-1"
            ),
            "line 2 is not UTF-8",
        ),
        (b"\x00\x01", "line 1 is not JSON"),
    ],
)
def test_encodings(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "odd.jsonl").write_bytes(content)
    refused(f"medqa:{tmp_path / 'odd.jsonl'}", said)


def test_images_of_a_task_without_images(tmp_path: Path) -> None:
    row = {**ROW, "image": "a.png"}
    refused(f"medqa:{write(tmp_path, row)}", "names an image, and task medqa shows none")
    assert questions(f"medqa:{write(tmp_path, {**ROW, 'image': None})}").examples


@pytest.mark.parametrize("identity", [None, True, 1.5, [1], {"a": 1}])
def test_an_id_is_a_text_or_a_number(tmp_path: Path, identity: Any) -> None:
    refused(f"medqa:{write(tmp_path, {**ROW, 'id': identity})}", "is neither a text nor a whole")


def test_a_users_own_file_goes_by_its_name(tmp_path: Path) -> None:
    asked = questions(f"medqa:{write(tmp_path, ROW, name='ours.jsonl')}")
    assert asked.file == "ours.jsonl"
    assert questions("medqa").file is None
    # The same bytes are the same set, whatever the file is called.
    sample = plugins.ROOT / "tasks" / "samples" / "medqa.jsonl"
    (tmp_path / "copy.jsonl").write_bytes(sample.read_bytes())
    assert questions(f"medqa:{tmp_path / 'copy.jsonl'}").file is None
    assert task_title("medqa", None, asked.file) == "medqa:ours.jsonl"
    assert task_title("worldmedqa", "he", None) == "worldmedqa/he"
    entry = record.task_set("medqa", asked.sha256, asked.file)
    assert (entry["name"], entry["sha256"]) == ("medqa:ours.jsonl", asked.sha256)
    assert entry["licence"] is None


def test_specs(tmp_path: Path) -> None:
    refused("medqua", "unknown task 'medqua'. Did you mean 'medqa'?")
    refused("medqa:", "task file '' does not exist. Give medqa:FILE.jsonl")
    refused(f"medqa:{tmp_path}", "does not exist")
    refused(
        "medqa/en:nowhere.jsonl", "task file nowhere.jsonl does not exist. Give medqa/en:FILE.jsonl"
    )


def test_the_page_of_tasks_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_tasks", ROOT / "docs" / "make_tasks.py")
    make_tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tasks)
    assert (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8") == make_tasks.page(), (
        "run: make docs"
    )
