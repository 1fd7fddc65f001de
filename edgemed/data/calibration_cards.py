"""Calibration cards from a user's own text, and whether a card shares text with an evaluation.

A model calibrated on the questions it is judged by is flattered, and a card with patients' names in
it travels further than anyone meant. Both are looked for by plain rules that are written down here;
neither search proves that nothing is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.artifacts.hashing import file_sha256
from edgemed.data.text_sets import read_rows, texts_of
from edgemed.errors import EdgemedError

MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
DATE = (
    rf"\b(?:\d{{1,2}}[/.-]\d{{1,2}}[/.-]\d{{2,4}}|\d{{4}}-\d{{2}}-\d{{2}}"
    rf"|\d{{1,2}}\s+{MONTH}\.?,?\s+\d{{4}}|{MONTH}\.?\s+\d{{1,2}},?\s+\d{{4}})\b"
)
# A person: a title or 'patient' before a capitalised word, or two capitalised words after 'name:'.
PERSON = (
    r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof)\.?\s+[A-ZÀ-Þ]\w+|\b[Pp]atient(?:'s)?(?:"
    r" name)?:?\s+[A-ZÀ-Þ][a-zà-ÿ]+\s+[A-ZÀ-Þ][a-zà-ÿ]+|\b[Nn]ame:\s*[A-ZÀ-Þ]\w+,?\s+[A-ZÀ-Þ]\w+"
)
# kind -> pattern of what is taken for a trace of a patient
TRACES = {
    "e-mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.\w[\w.]+"),
    "phone number": re.compile(
        r"(?<![\w.-])(?:\+\d{1,3}["
        r" .-]?)?(?:\(\d{3}\)\s?|\d{3}[.-])\d{3}[.-]\d{4}(?![\w-])|(?<!\w)\+\d{1,3}(?:["
        r" .-]\d{2,4}){2,5}(?!\w)"
    ),
    "social security number": re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"),
    "record number": re.compile(
        r"\b(?:MRN|medical record (?:number|no\.?)|patient (?:id|number|no\.?)|chart"
        r" (?:number|no\.?)|accession (?:number|no\.?)|case id)\W{0,3}[A-Z]{0,4}-?\d{4,}",
        re.IGNORECASE,
    ),
    "date of birth": re.compile(
        rf"\b(?:DOB|D\.O\.B\.|date of birth|born (?:on )?)\W{{0,3}}{DATE}", re.IGNORECASE
    ),
    "DICOM tag": re.compile(
        r"\(0010,[0-9A-Fa-f]{4}\)|\b(?:PatientName|PatientID|PatientBirthDate|PatientAddress|AccessionNumber|ReferringPhysicianName|OtherPatientIDs)\b"
    ),
}


@dataclass(frozen=True)
class Source:
    """Where a user's text comes from, as the card will say it."""

    name: str
    source: str
    licence: str
    language: str = "en"
    description: str = ""


def make(
    file: Path,
    out: Path,
    source: Source,
    heldout: float = 0.2,
    allow_traces: bool = False,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Write calibration.jsonl, heldout.jsonl and card.yaml into `out` from a .jsonl file of rows
    with "text" or "messages" (data.texts_of) or a .txt file of paragraphs; returns the card.

    Like texts are kept once; a text is held out by the hash of its words, so the same file is
    always split alike, and a longer one does not move texts from one side to the other. tokenizer:
    counts tokens too. Raises EdgemedError for an unreadable file, a text that carries traces of a
    patient (unless allow_traces), a directory that is there already, or too few texts.
    """
    import yaml

    if not 0 < heldout < 1:
        raise EdgemedError(f"heldout {heldout} is not a share between 0 and 1", "For example 0.2")
    if Path(out).exists():
        raise EdgemedError(f"{out} exists", "Choose another --out, or remove it")
    found = _own_texts(Path(file))
    traces = list(traces_of(text for text, _ in found))
    if traces and not allow_traces:
        first = "; ".join(f"text {number}: {kind}" for number, kind in traces[:3])
        more = f" and {len(traces) - 3} more" if len(traces) > 3 else ""
        raise EdgemedError(
            f"{file} looks as if it held data of patients ({first}{more})",
            "Remove it, or give --allow-traces where you know that it does not or may travel",
        )
    unique = {" ".join(words(text)): (text, kept) for text, kept in found}
    sides: dict[str, list[tuple[str, dict[str, Any]]]] = {"calibration": [], "heldout": []}
    for plain, row in unique.items():
        sides[
            (
                "heldout"
                if int(hashlib.sha256(plain.encode()).hexdigest()[:8], 16) < heldout * 2**32
                else "calibration"
            )
        ].append(row)
    if not all(sides.values()):
        raise EdgemedError(
            f"{file}: {len(unique)} different texts are too few to hold {heldout:g} of them out",
            "Give more texts, or another --heldout",
        )
    out.mkdir(parents=True)
    files = {
        split: _written(out / f"{split}.jsonl", rows, tokenizer) for split, rows in sides.items()
    }
    card = {
        "name": source.name,
        "description": source.description or f"Made by edgemed from {Path(file).name}.",
        "source": source.source,
        "licence": source.licence,
        "language": source.language,
        "contains_phi": (
            "not checked by a person" if not traces else "traces found, allowed by --allow-traces"
        ),
        "made_from": {
            "file": Path(file).name,
            "sha256": file_sha256(file),
            "texts": len(found),
            "repeated": len(found) - len(unique),
        },
        "files": files,
    }
    (out / "card.yaml").write_text(
        yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=150), encoding="utf-8"
    )
    return card


def _written(file: Path, rows: list[tuple[str, dict[str, Any]]], tokenizer: Any) -> dict[str, Any]:
    """Write one split; its entry in the card."""
    file.write_text(
        "".join(
            json.dumps(
                {"id": hashlib.sha256(text.encode()).hexdigest()[:12], **kept}, ensure_ascii=False
            )
            + "\n"
            for text, kept in rows
        ),
        encoding="utf-8",
    )
    facts = {"file": file.name, "sha256": file_sha256(file), "n": len(rows)}
    return facts | (
        {"tokens": sum(len(tokenizer.encode(text).ids) for text, _ in rows)} if tokenizer else {}
    )


def _own_texts(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(text, what a card's row keeps of it: 'text' or 'messages', and 'language' where it is said)
    of every row.
    """
    if not file.is_file():
        raise EdgemedError(
            f"text file {file} does not exist",
            'Give a .jsonl file with rows {"text": ...}, or a .txt file with a blank line between'
            " texts",
        )
    with open(file, "rb") as handle:
        if handle.read(132)[128:] == b"DICM":
            raise EdgemedError(
                f"{file} is a DICOM file",
                "A card holds text; export reports without patient data first",
            )
    if file.suffix in (".jsonl", ".json"):
        keys = {
            str(key)
            for row in read_rows(file)
            for key in row
            if TRACES["DICOM tag"].search(str(key))
        }
        if keys:
            raise EdgemedError(
                f"{file} holds DICOM fields ({', '.join(sorted(keys)[:3])})",
                "Keep only the texts, without patient data",
            )
    found = texts_of(file)
    rows = [{}] * len(found) if file.suffix == ".txt" else read_rows(file)
    return [
        (
            text,
            {key: row[key] for key in ("language", "messages") if key in row}
            | ({} if "messages" in row else {"text": text}),
        )
        for text, row in zip(found, rows, strict=True)
    ]


def traces_of(found: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(number of the text from 1, kind) of everything that looks like data of a patient: TRACES, or
    a person's name and a date in one text. Other traces are not seen.
    """
    for number, text in enumerate(found, 1):
        for kind, pattern in TRACES.items():
            if pattern.search(text):
                yield number, kind
        if re.search(PERSON, text) and re.search(DATE, text, re.IGNORECASE):
            yield number, "name and date"


def words(text: str) -> list[str]:
    """Lower-case words; of scripts that put no spaces between words, every character is one."""
    return re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+",
        text.casefold(),
    )
