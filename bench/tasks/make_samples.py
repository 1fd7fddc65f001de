"""Cuts the real samples and solved examples of the tasks in edgemed/tasks/samples/, with their
cards, from the whole public sets.

Seeded, so that everybody can cut them again: python bench/tasks/make_samples.py --data DIR, where
DIR holds text_mcq/, text_qa/, images/ and vqa/ (default: ../shared/data beside the project).
--whole OUT also writes each whole set in the layout `edgemed eval --task NAME:OUT/NAME.jsonl` reads
  (subject, language and country filled in).
The rows of pubmedqa.jsonl and section.jsonl themselves are cut by bench/tiny/samples.py, together
with the quickstart's training data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import image_samples
import yaml

PROJECT = Path(__file__).resolve().parents[2]
SAMPLES = PROJECT / "edgemed" / "tasks" / "samples"
SEED = 20240601
MIRAGE = "files as in Teddy-XiongGZ/MIRAGE, commit 392943af99cd"
LOCAL = {"brazil": "pt", "israel": "he", "japan": "ja", "spain": "es"}
LICENCES = (
    "medqa_MIT.txt",
    "medmcqa_MIT.txt",
    "headqa_MIT.txt",
    "worldmedqa_MIT.txt",
    "MIRAGE_NCBI_public_domain.txt",
    "bccd_MIT.txt",
    "chula_rbc12_MIT.txt",
)
Row = dict[str, Any]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path, **more: str) -> list[Row]:
    """Rows of a file, with `more` added to each."""
    return [
        {**json.loads(line), **more}
        for line in path.read_text(encoding="utf-8").split("\n")
        if line
    ]


def distinct(row: Row) -> bool:
    """Whether no two options are the same; rows where two are (the sets have a few) are poor
    questions and not sampled.
    """
    return "options" not in row or len(
        {option.strip() for option in row["options"].values()}
    ) == len(row["options"])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def plain(row: Row) -> str:
    return " ".join((row.get("question") or row["passage"]).split()).casefold()


def mixed(rows: list[Row], salt: str) -> list[Row]:
    return random.Random(f"{SEED} {salt}").sample(rows, len(rows))


def per_group(rows: list[Row], group: Callable[[Row], str], count: int, salt: str) -> list[Row]:
    """The same number from each group, no question twice, shuffled, so that any first rows are as
    mixed as the whole.
    """
    taken = []
    seen = set()
    left = dict.fromkeys(sorted({group(row) for row in rows}), count)
    for row in mixed(rows, salt):
        if left[group(row)] and distinct(row) and plain(row) not in seen:
            left[group(row)] -= 1
            seen.add(plain(row))
            taken.append(row)
    assert not any(left.values()), f"{salt}: too few rows in {left}"
    return taken


def others(rows: list[Row], sample: list[Row]) -> list[Row]:
    """The rows whose question the sample does not ask."""
    asked = {plain(row) for row in sample}
    return [row for row in rows if plain(row) not in asked]


def save(
    name: str,
    sample: list[Row] | None,
    shots: list[Row],
    facts: Row,
    data: Path,
    whole: list[tuple[str, int]],
) -> None:
    """Sample, solved examples and card. sample: None where only the solved examples and their part
    of the card are new.
    """
    file = SAMPLES / f"{name}.jsonl"
    shot_file = SAMPLES / f"{name}.shots.jsonl"
    card_file = SAMPLES / f"{name}.card.yaml"
    write_rows(shot_file, shots)
    described = {
        "file": shot_file.name,
        "n": len(shots),
        "sha256": sha256(shot_file),
        "from": facts.pop("shots_from"),
    }
    if sample is None:
        card = yaml.safe_load(card_file.read_text(encoding="utf-8")) | {"shots": described}
    else:
        write_rows(file, sample)
        sets = [{"path": path, "sha256": sha256(data / path), "n": n} for path, n in whole]
        card = {
            "name": name,
            "source": facts["source"],
            "url": facts["url"],
            "licence": "MIT",
            "split": facts["split"],
            "n": len(sample),
            "sha256": sha256(file),
            "whole_set": sets[0] if len(sets) == 1 else sets,
            "contains_phi": False,
            "changes": facts["changes"],
            "shots": described,
        }
    card_file.write_text(
        yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=150), encoding="utf-8"
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def medqa(data: Path) -> list[Row]:
    path = "text_mcq/medqa.jsonl"
    rows = read(data / path)
    sample = per_group(rows, lambda row: "", 300, "medqa")
    shots = per_group(others(rows, sample), lambda row: "", 20, "medqa shots")
    facts = {
        "source": f"MedQA-USMLE, Jin et al. 2020 (github.com/jind11/MedQA); {MIRAGE}",
        "url": "https://github.com/jind11/MedQA",
        "split": "test (the official 1,273)",
        "changes": "seeded random 300 of the 1,273, shuffled",
        "shots_from": (
            "the same test split, because only that one was at hand: 20 rows that are not in the"
            " sample. An evaluation on the whole set drops the solved examples it asks"
        ),
    }
    save("medqa", sample, shots, facts, data, [(path, lines(data / path))])
    return rows


def medmcqa(data: Path) -> list[Row]:
    path = "text_mcq/medmcqa.jsonl"
    rows = read(data / path)
    known = [row for row in rows if row["subject"] != "Unknown"]
    sample = per_group(known, lambda row: row["subject"], 15, "medmcqa")
    shots = per_group(others(known, sample), lambda row: row["subject"], 1, "medmcqa shots")
    facts = {
        "source": f"MedMCQA, Pal et al. 2022 (github.com/medmcqa/medmcqa); {MIRAGE}",
        "url": "https://github.com/medmcqa/medmcqa",
        "split": "dev (the official 4,183)",
        "changes": (
            "15 seeded random rows of each of the 20 subjects, shuffled; the whole set is a third"
            " dental, so accuracies are not comparable with published ones. 21 of the 4,183 rows"
            " have two identical options and are not sampled"
        ),
        "shots_from": (
            "the same dev split, because only that one was at hand: one row of each subject that is"
            " not in the sample"
        ),
    }
    save("medmcqa", sample, shots, facts, data, [(path, lines(data / path))])
    return rows


def mmlu_medical(data: Path) -> list[Row]:
    path = "text_mcq/mmlu.jsonl"
    rows = [
        {**row, "subject": row["id"].removeprefix("mmlu/").rpartition("-")[0]}
        for row in read(data / path)
    ]
    shots = read(data / "text_mcq/mmlu_dev.jsonl")
    sample = per_group(others(rows, shots), lambda row: row["subject"], 60, "mmlu_medical")
    facts = {
        "source": (
            f"MMLU, Hendrycks et al. 2021 (github.com/hendrycks/test); {MIRAGE}; dev via"
            " jiangsongtao/TinyMed, commit ba7b11a97bbb"
        ),
        "url": "https://github.com/hendrycks/test",
        "split": "test (the official 1,089 of six medical subjects)",
        "changes": (
            "60 seeded random rows of each subject, no question text twice and none that dev has"
            " too, shuffled; subject added from the id"
        ),
        "shots_from": "the official dev split, 5 of each subject",
    }
    save("mmlu_medical", sample, shots, facts, data, [(path, lines(data / path))])
    return rows


def headqa(data: Path) -> list[Row]:
    def item(row: Row) -> str:
        return row["id"].partition("/")[2]

    paths = [f"text_mcq/headqa_{language}_test.jsonl" for language in ("en", "es")]
    english, spanish = (read(data / path, language=path.split("_")[2]) for path in paths)
    train = [
        read(data / f"text_mcq/headqa_{language}_train.jsonl", language=language)
        for language in ("en", "es")
    ]
    # English rows are translations of the Spanish ones: one item in one language only, or the same
    # question would count twice.
    half = {item(row) for row in mixed(english, "headqa halves")[: len(english) // 2]}
    parts = [
        [row for row in english if item(row) in half],
        [row for row in spanish if item(row) not in half],
    ]
    # 204 = 6 subjects x 34
    sample = mixed(
        [
            row
            for part in parts
            for row in per_group(
                part, lambda row: row["subject"], 34, f"headqa {part[0]['language']}"
            )
        ],
        "headqa order",
    )
    shots = mixed(
        [
            row
            for rows in train
            for row in per_group(
                others(rows, sample),
                lambda row: row["subject"],
                3,
                f"headqa shots {rows[0]['language']}",
            )
        ],
        "headqa shots order",
    )
    facts = {
        "source": (
            "HEAD-QA, Vilares and Gomez-Rodriguez, ACL 2019 (github.com/aghie/head-qa); files via"
            " claudiaqw/head-qa-afi, commit 9a8c0b3be470"
        ),
        "url": "https://github.com/aghie/head-qa",
        "split": "test (official, 2,675 without images in each language)",
        "changes": (
            "34 seeded random rows of each of the 6 subjects in each language, no item in both"
            " languages, shuffled; items with an image dropped; language added"
        ),
        "shots_from": (
            "the official train split (five options each), 3 of each subject in each language"
        ),
    }
    save("headqa", sample, shots, facts, data, [(path, lines(data / path)) for path in paths])
    return [*english, *spanish]


def worldmedqa(data: Path) -> list[Row]:
    local = {}
    english = {}
    paths = []
    for country, language in LOCAL.items():
        files = [f"text_mcq/worldmedqa_{country}_{kind}.jsonl" for kind in ("local", "english")]
        paths += files
        local[country], english[country] = (
            [
                {**row, "id": f"{row['id']}/{spoken}"}
                for row in read(data / file, country=country, language=spoken)
            ]
            for file, spoken in zip(files, (language, "en"), strict=True)
        )

    def item(row: Row) -> str:
        return row["id"].partition("/")[0]

    sample = []
    shots = []
    for country in LOCAL:
        # One item in one language only, or the same question would count twice; the same holds
        # between sample and solved examples.
        asked = per_group(local[country], lambda row: "", 40, f"worldmedqa {country}")
        used = {item(row) for row in asked}
        asked += per_group(
            [row for row in english[country] if item(row) not in used],
            lambda row: "",
            10,
            f"worldmedqa {country} en",
        )
        used = {item(row) for row in asked}
        free = others([row for row in local[country] if item(row) not in used], asked)
        solved = per_group(free, lambda row: "", 6, f"worldmedqa {country} shots")
        free = others(
            [
                row
                for row in english[country]
                if item(row) not in used | {item(row) for row in solved}
            ],
            asked,
        )
        solved += per_group(free, lambda row: "", 2, f"worldmedqa {country} shots en")
        sample = sample + asked
        shots = shots + solved
    facts = {
        "source": "WorldMedQA-V, Matos et al. 2024 (github.com/WorldMedQA/V, commit ec9c47478431)",
        "url": "https://github.com/WorldMedQA/V",
        "split": "all (568 questions, each in two languages)",
        "changes": (
            "text only: the image every question comes with is not used. 40 seeded random questions"
            " per country in its language and 10 other ones in English, shuffled; country and"
            " language added, language appended to the id; 4 rows with two identical options not"
            " sampled"
        ),
        "shots_from": (
            "the same set, which has only one split: questions that the sample asks in no language,"
            " 6 per local language and 8 in English"
        ),
    }
    save(
        "worldmedqa",
        mixed(sample, "worldmedqa order"),
        mixed(shots, "worldmedqa shots order"),
        facts,
        data,
        [(path, lines(data / path)) for path in paths],
    )
    return [row for country in LOCAL for row in (*local[country], *english[country])]


def pubmedqa(data: Path) -> list[Row]:
    rows = read(data / "text_qa/pubmedqa_pqal.jsonl")
    kept = [
        {key: row[key] for key in ("id", "question", "contexts", "labels", "answer")}
        for row in rows
        if row["split"] == "train"
    ]
    save(
        "pubmedqa",
        None,
        mixed(kept, "pubmedqa shots")[:20],
        {"shots_from": "the official train split, 20 seeded random rows"},
        data,
        [],
    )
    return [
        {key: row[key] for key in ("id", "question", "contexts", "labels", "answer")}
        for row in rows
        if row["split"] == "test"
    ]


def pubmedqa_conclusion(data: Path) -> list[Row]:
    path = "text_qa/pubmedqa_pqal.jsonl"
    rows = {"train": [], "test": []}
    for row in read(data / path):
        question = {key: row[key] for key in ("id", "question", "long_answer", "answer")}
        rows[row["split"]].append(question)
    facts = {
        "source": (
            "PubMedQA PQA-L, Jin et al., EMNLP 2019 (github.com/pubmedqa/pubmedqa, commit"
            " 1cbae8e92f72)"
        ),
        "url": "https://github.com/pubmedqa/pubmedqa",
        "split": "test (the official 500)",
        "changes": "all 500, shuffled; the fields id, question, long_answer, answer only",
        "shots_from": "the official train split, 20 seeded random rows",
    }
    save(
        "pubmedqa_conclusion",
        mixed(rows["test"], "pubmedqa_conclusion"),
        mixed(rows["train"], "pubmedqa_conclusion shots")[:20],
        facts,
        data,
        [(path, len(rows["test"]))],
    )
    return rows["test"]


def section() -> None:
    """The train passages that the quickstart's calibration set holds: they are in the project
    already, with their labels.
    """
    rows = []
    for line in (
        (PROJECT / "calibration/pubmedqa-sections/calibration.jsonl")
        .read_text(encoding="utf-8")
        .split("\n")
    ):
        if line:
            row = json.loads(line)
            passage, _, answer = row["text"].removeprefix("Passage: ").rpartition("\nSection: ")
            rows.append({"id": row["id"], "passage": passage, "answer": answer})
    shots = per_group(rows, lambda row: row["answer"], 5, "section shots")
    save(
        "section",
        None,
        shots,
        {
            "shots_from": (
                "the official train split, 5 passages of each section out of"
                " calibration/pubmedqa-sections"
            )
        },
        Path(),
        [],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data")
    parser.add_argument("--whole", type=Path)
    arguments = parser.parse_args()
    whole = {
        make.__name__: make(arguments.data)
        for make in (
            medqa,
            medmcqa,
            mmlu_medical,
            headqa,
            worldmedqa,
            pubmedqa,
            pubmedqa_conclusion,
        )
    }
    section()
    image_samples.cells(arguments.data)
    image_samples.vqa_rad(arguments.data)
    image_samples.shown_in_verify(arguments.data)
    image_samples.synthetic()
    for name in LICENCES:
        shutil.copyfile(arguments.data / "LICENSES" / name, PROJECT / "LICENSES" / name)
    if arguments.whole:
        arguments.whole.mkdir(parents=True, exist_ok=True)
        for name, rows in whole.items():
            write_rows(arguments.whole / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
