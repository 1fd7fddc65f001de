"""Calibration cards from a user's own text, refused where the text looks like data of patients.

A card with patients' names in it travels further than anyone meant. They are looked for by plain
rules that are written down here. The search does not prove that nothing is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.artifacts.hashing import file_sha256
from edgemed.data.text_sets import CARD, read_rows, texts_of
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
    # Looked for at the beginning of a run only: from each of its characters, a long run without an
    # @ would take time by its square.
    "e-mail address": re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+\.\w[\w.]+"),
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

TextRow = tuple[str, dict[str, Any]]  # a text, and what the card keeps of its row


@dataclass(frozen=True)
class Source:
    """Where a user's text comes from, as the card will say it."""

    name: str
    source: str
    licence: str
    language: str = "en"
    description: str = ""


def make_card(
    file: Path,
    out: Path,
    source: Source,
    heldout: float = 0.2,
    allow_traces: bool = False,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Write calibration.jsonl, heldout.jsonl and card.yaml into `out`; returns the card.

    file: .jsonl with rows of "text" or "messages" (text_sets.texts_of), or .txt with paragraphs.
    heldout: share of the texts in the validation split. Like texts are kept once. A text's split
    comes from the hash of its words. So the same file is always split alike, and a longer file does
    not move texts from one split to the other. tokenizer: counts tokens too.

    Raises EdgemedError for an unreadable file, a text that carries traces of a patient (unless
    allow_traces), a directory that is there already, or too few texts.
    """
    import yaml

    if not 0 < heldout < 1:
        raise EdgemedError(f"heldout {heldout} is not a share between 0 and 1", "For example 0.2")
    if Path(out).exists():
        raise EdgemedError(f"{out} exists", "Choose another --out, or remove it")
    texts = _own_texts(Path(file))
    traces = list(traces_of(text for text, _ in texts))
    if traces and not allow_traces:
        raise _traces_error(file, traces)
    unique = {" ".join(words(text)): (text, row) for text, row in texts}
    splits = _split(unique, heldout)
    if not all(splits.values()):
        raise EdgemedError(
            f"{file}: {len(unique)} different texts are too few for a validation split of"
            f" {heldout:g}",
            "Give more texts, or another --heldout",
        )
    card: dict[str, Any] = {
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
            "texts": len(texts),
            "repeated": len(texts) - len(unique),
        },
    }
    with _whole_or_absent(Path(out)) as part:
        card["files"] = {
            split: _write_split(part / f"{split}.jsonl", rows, tokenizer)
            for split, rows in splits.items()
        }
        (part / CARD).write_text(
            yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=150), encoding="utf-8"
        )
    return card


@contextlib.contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place at the end, or is gone."""
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        os.replace(part, out)
    except OSError as error:
        raise EdgemedError(
            f"cannot write {out}: {error.strerror}", "Choose another --out, or free space"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _traces_error(file: Path, traces: Sequence[tuple[int, str]]) -> EdgemedError:
    first = "; ".join(f"text {number}: {kind}" for number, kind in traces[:3])
    more = f" and {len(traces) - 3} more" if len(traces) > 3 else ""
    return EdgemedError(
        f"{file} looks as if it held data of patients ({first}{more})",
        "Remove it, or give --allow-traces where you know that it does not or may travel",
    )


def _split(unique: Mapping[str, TextRow], heldout: float) -> dict[str, list[TextRow]]:
    """unique: the words of each text -> (text, what the card keeps of its row)."""
    splits: dict[str, list[TextRow]] = {"calibration": [], "heldout": []}
    for plain, row in unique.items():
        # The first 32 bits of the hash, uniform over [0, 2^32).
        place = int(hashlib.sha256(plain.encode()).hexdigest()[:8], 16)
        splits["heldout" if place < heldout * 2**32 else "calibration"].append(row)
    return splits


def _write_split(file: Path, rows: Sequence[TextRow], tokenizer: Any) -> dict[str, Any]:
    """Write one split. Returns its entry in the card."""
    lines = []
    for text, row in rows:
        text_id = hashlib.sha256(text.encode()).hexdigest()[:12]
        lines.append(json.dumps({"id": text_id, **row}, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    entry = {"file": file.name, "sha256": file_sha256(file), "n": len(rows)}
    if tokenizer:
        entry["tokens"] = sum(len(tokenizer.encode(text).ids) for text, _ in rows)
    return entry


def _own_texts(file: Path) -> list[TextRow]:
    """(text, what a card's row keeps of it: 'text' or 'messages', and 'language' where it has one)
    of every row.
    """
    if not file.is_file():
        raise EdgemedError(
            f"text file {file} does not exist",
            'Give a .jsonl file with rows {"text": ...}, or a .txt file with a blank line between'
            " texts",
        )
    _check_no_dicom(file)
    texts = texts_of(file)
    if file.suffix == ".txt":
        return [(text, {"text": text}) for text in texts]
    return [
        (text, _kept_fields(text, row)) for text, row in zip(texts, read_rows(file), strict=True)
    ]


def _kept_fields(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: row[key] for key in ("language", "messages") if key in row}
    if "messages" not in row:
        fields["text"] = text
    return fields


def _check_no_dicom(file: Path) -> None:
    with open(file, "rb") as handle:
        # A DICOM file has 128 bytes of preamble, then these four.
        if handle.read(132)[128:] == b"DICM":
            raise EdgemedError(
                f"{file} is a DICOM file",
                "A card holds text; export reports without patient data first",
            )
    if file.suffix not in (".jsonl", ".json"):
        return
    keys: set[str] = set()
    for row in read_rows(file):
        keys.update(str(key) for key in row if TRACES["DICOM tag"].search(str(key)))
    if keys:
        raise EdgemedError(
            f"{file} holds DICOM fields ({', '.join(sorted(keys)[:3])})",
            "Keep only the texts, without patient data",
        )


def traces_of(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(number of the text from 1, kind) of everything that looks like data of a patient: TRACES, or
    a person's name and a date in one text. Other traces are not seen.
    """
    for number, text in enumerate(texts, 1):
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
