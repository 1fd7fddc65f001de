"""Small text sets for calibration and distillation, written as a user's own .jsonl file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from edgemed.data.text_sets import texts


def write_texts(file: Path, rows: Iterable[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def section_texts(file: Path) -> str:
    """Forty short texts of PubMedQA, so that a run takes a second."""
    rows = [{"id": n, "text": text[:300]} for n, text in enumerate(texts("pubmedqa-sections")[:40])]
    return write_texts(file, rows)


def dose_texts(file: Path) -> str:
    """Forty made-up sentences with other numbers each."""
    rows = [
        {
            "id": str(i),
            "text": f"Dose {i} of {3 * i} mg is given each morning, and {i * i} at night. ",
        }
        for i in range(40)
    ]
    return write_texts(file, rows)
