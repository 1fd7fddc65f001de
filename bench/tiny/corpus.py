"""Reads the two open text sets and decides which documents may be trained on.

One place for that decision, so that the tokenizer, the pretraining, the task and the calibration
samples cannot disagree about what is held out.
"""

import gzip
import hashlib
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
WORK = HERE / "work"
PUBMEDQA = "text_qa/pubmedqa_pqal.jsonl"
MEDQUAD = "text_qa/medquad.jsonl.gz"
HELD_OUT_PERCENT = 2


def data_argument(parser):
    """Every script takes the same data folder, by default the one beside the project."""
    parser.add_argument(
        "--data",
        type=Path,
        default=PROJECT.parent / "shared" / "data",
        help="folder that holds text_qa/",
    )


def pubmedqa(data, split):
    """The abstracts of the official split, 'train' or 'test'."""
    with open(data / PUBMEDQA, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["split"] == split]


def abstract(row):
    """A whole abstract, its question (the article's title) first."""
    return "\n".join([row["question"], *row["contexts"], row["long_answer"]])


def medquad(data):
    """MedQuAD as (training rows, held-out rows), split by document.

    Sources reuse each other's document numbers, so a document is its source and number. Some
    answers occur word for word in several documents: a held-out row whose answer is also in a
    training document is left out of both.
    """
    with gzip.open(data / MEDQUAD, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    train = []
    held = []
    for row in rows:
        document = f"{row['source']}/{row['id'].rsplit('-', 1)[0]}"
        number = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 100
        (held if number < HELD_OUT_PERCENT else train).append(row)
    known = {row["answer"] for row in train}
    return train, [row for row in held if row["answer"] not in known]


def pair(row):
    return f"{row['question']}\n{row['answer']}"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
