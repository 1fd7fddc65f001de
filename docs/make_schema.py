"""Writes docs/report.schema.json from the documents in edgemed/documents; a test compares them.

Usage: python docs/make_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path

from edgemed.documents.json_schema import report_schema


def content() -> str:
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("report.schema.json").write_text(content(), encoding="utf-8")
