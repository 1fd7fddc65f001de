"""Writes the small real samples that ship with the project: task samples, calibration sets and
their cards.

They are cut here, from the same splits the model is trained on, so that no calibration row is a
test row and no test row is a training row.
"""

import argparse
import csv
import json
import random
import shutil

import yaml
from corpus import (
    PROJECT,
    PUBMEDQA,
    abstract,
    data_argument,
    medquad,
    pair,
    pubmedqa,
    sha256,
)
from section import ANSWERS, answer_text, items, prompt

SEED = 20240601
LONGEST_ANSWER = 2500
PUBMEDQA_SOURCE = {
    "source": (
        "PubMedQA PQA-L, Jin et al., EMNLP 2019 (github.com/pubmedqa/pubmedqa, commit 1cbae8e92f72)"
    ),
    "url": "https://github.com/pubmedqa/pubmedqa",
    "licence": "MIT",
}
MEDQUAD_SOURCE = {
    "source": (
        "MedQuAD, Ben Abacha and Demner-Fushman, BMC Bioinformatics 2019"
        " (github.com/abachaa/MedQuAD, commit 577bd37b96c0)"
    ),
    "url": "https://github.com/abachaa/MedQuAD",
    "licence": "CC-BY-4.0",
}
DIALOGUES = "clinical_text/MTS-Dialog-TrainingSet.csv"
DIALOGUE_SOURCE = {
    "source": (
        "MTS-Dialog, Ben Abacha et al., EACL 2023 (github.com/abachaa/MTS-Dialog, commit"
        " 3ff080193360)"
    ),
    "url": "https://github.com/abachaa/MTS-Dialog",
    "licence": "CC-BY-4.0",
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def write_card(path, card):
    path.write_text(
        yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=150), encoding="utf-8"
    )


def choose(rows, count, salt):
    return random.Random(f"{SEED} {salt}").sample(rows, count)


def task_sample(name, rows, data, whole_count, changes):
    folder = PROJECT / "edgemed" / "tasks" / "samples"
    path = folder / f"{name}.jsonl"
    write_rows(path, rows)
    card = {
        "name": name,
        **PUBMEDQA_SOURCE,
        "split": "test (the official 500 abstracts)",
        "n": len(rows),
        "sha256": sha256(path),
    }
    card["whole_set"] = {"path": PUBMEDQA, "sha256": sha256(data / PUBMEDQA), "n": whole_count}
    write_card(folder / f"{name}.card.yaml", card | {"contains_phi": False, "changes": changes})


def calibration_set(name, description, source, parts, language="en"):
    folder = PROJECT / "calibration" / name
    files = {}
    for part, rows in parts.items():
        path = folder / f"{part}.jsonl"
        write_rows(path, rows)
        files[part] = {"file": path.name, "sha256": sha256(path), "n": len(rows)}
    write_card(
        folder / "card.yaml",
        {
            "name": name,
            "description": description,
            **source,
            "language": language,
            "contains_phi": False,
            "files": files,
        },
    )


def write_task_samples(data):
    """Both task samples; gives what of the test split they leave unused, abstracts and section
    items.
    """
    test = items(data, "test")
    section = choose(test, 400, "section")
    labels = (
        f"authors' section labels mapped to {', '.join(ANSWERS)}; mixed and unknown labels dropped;"
        " the long answer is the conclusion"
    )
    task_sample(
        "section",
        section,
        data,
        len(test),
        f"{labels}; seeded random 400 of the {len(test)} labelled passages",
    )

    abstracts = pubmedqa(data, "test")
    rows = [
        {key: row[key] for key in ("id", "question", "contexts", "labels", "answer")}
        for row in choose(abstracts, 200, "pubmedqa")
    ]
    task_sample(
        "pubmedqa",
        rows,
        data,
        len(abstracts),
        "seeded random 200 of the 500; the fields id, question, contexts, labels, answer only",
    )
    asked = {row["id"] for row in rows}
    used = {item["id"].split("#")[0] for item in section}
    return [row for row in abstracts if row["id"] not in asked], [
        item for item in test if item["id"].split("#")[0] not in used
    ]


def write_calibration_sets(data, unused_abstracts, unused_items):
    def abstracts(rows, count, salt):
        return [{"id": row["id"], "text": abstract(row)} for row in choose(rows, count, salt)]

    calibration_set(
        "pubmedqa-abstracts",
        "Whole PubMed abstracts: question (the title), contexts, conclusion. Calibration from the"
        " train split, heldout from test abstracts that the pubmedqa sample does not use.",
        PUBMEDQA_SOURCE,
        {
            "calibration": abstracts(pubmedqa(data, "train"), 256, "abstracts train"),
            "heldout": abstracts(unused_abstracts, 64, "abstracts test"),
        },
    )

    def answers(rows, count, salt):
        return [
            {"id": f"{row['source']}/{row['id']}", "text": pair(row)[:LONGEST_ANSWER]}
            for row in choose(rows, count, salt)
        ]

    train, held = medquad(data)
    calibration_set(
        "medquad-answers",
        f"Consumer health questions and answers, cut at {LONGEST_ANSWER} characters. Heldout from"
        " documents the quickstart model was not trained on.",
        MEDQUAD_SOURCE,
        {
            "calibration": answers(train, 256, "medquad train"),
            "heldout": answers(held, 64, "medquad held"),
        },
    )

    def prompts(rows, count, salt):
        return [
            {"id": item["id"], "text": prompt(item["passage"]) + answer_text(item["answer"])}
            for item in choose(rows, count, salt)
        ]

    calibration_set(
        "pubmedqa-sections",
        "The section task's own prompts with their answers. Calibration from the train split,"
        " heldout from test abstracts that the section sample does not use.",
        PUBMEDQA_SOURCE,
        {
            "calibration": prompts(items(data, "train"), 256, "sections train"),
            "heldout": prompts(unused_items, 64, "sections test"),
        },
    )


def write_conversations(data):
    """MedQuAD's questions and answers as conversations, which take the chat template of the model
    that is calibrated.
    """
    train, held = medquad(data)
    parts = {}
    for split, rows, count in (("calibration", train, 192), ("heldout", held, 48)):
        chosen = choose(rows, count, f"conversations {split}")
        parts[split] = [
            {
                "id": f"{row['source']}/{row['id']}",
                "messages": [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"][:LONGEST_ANSWER]},
                ],
            }
            for row in chosen
        ]
    calibration_set(
        "medquad-chat",
        "Consumer health questions with their answers as conversations, answers cut at"
        f" {LONGEST_ANSWER} characters; each model gets them in its own chat template. Heldout from"
        " documents the quickstart model was not trained on.",
        MEDQUAD_SOURCE,
        parts,
    )


def write_dialogues(data):
    """Conversations of doctor and patient with the note that was written of them, all from the
    training split.
    """
    with open(data / DIALOGUES, encoding="utf-8-sig", newline="") as handle:
        rows = [
            row
            for row in csv.DictReader(handle)
            if len(row["dialogue"]) + len(row["section_text"]) <= LONGEST_ANSWER
        ]

    def turns(row):
        return "\n".join(
            " ".join(line.split()) for line in row["dialogue"].splitlines() if line.strip()
        )

    texts = [
        {"id": row["ID"], "text": f"{turns(row)}\n\nNote: {' '.join(row['section_text'].split())}"}
        for row in choose(rows, 320, "dialogues train")
    ]
    calibration_set(
        "mts-dialogues",
        "Conversations of doctor and patient, turn by turn, each with the section of the note"
        f" written of it; at most {LONGEST_ANSWER} characters. Written by people for de-identified"
        " notes, so nobody's own words. Both splits from the training split; it serves no task"
        " here.",
        DIALOGUE_SOURCE,
        {"calibration": texts[:256], "heldout": texts[256:]},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    data_argument(parser)
    data = parser.parse_args().data
    write_calibration_sets(data, *write_task_samples(data))
    write_conversations(data)
    write_dialogues(data)
    folder = PROJECT / "LICENSES"
    folder.mkdir(exist_ok=True)
    for name in ("pubmedqa_MIT.txt", "medquad_CC-BY-4.0.txt", "mts_dialog_CC-BY-4.0.txt"):
        shutil.copyfile(data / "LICENSES" / name, folder / name)


if __name__ == "__main__":
    main()
