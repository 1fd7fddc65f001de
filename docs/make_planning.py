"""Writes the tables of docs/planning.md from the code that predicts: python docs/make_planning.py

The page's prose is written by hand and kept; what follows its marker is computed, and a test
compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemed.planning.roofline import constants
from edgemed.planning.validation import validation

PAGE = Path(__file__).parent / "planning.md"
MARK = "<!-- computed by docs/make_planning.py: do not edit below -->"
TITLES = {
    "published": "Published rows",
    "found later": "Rows found after model and constants were fixed",
    "edgemed's own": "Our own rows",
    "not predicted": "Not predicted, and why",
}


def grid(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["none"]
    names = list(rows[0])
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)] + [
        "| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows
    ]


def page() -> str:
    prose = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    known = vars(constants())
    parts = ["## How far off", ""]
    found = validation()
    parts += [*grid(found["summary"]), "", "## The constants", ""]
    parts += [
        *grid(
            [
                {"constant": name, "value": value}
                for name, value in known.items()
                if not isinstance(value, dict)
            ]
        ),
        "",
    ]
    engines = list(known["cpu_bandwidth"])
    parts += grid(
        [
            {
                "engine on a CPU": name,
                "cpu_bandwidth": known["cpu_bandwidth"][name],
                "cpu_products": known["cpu_products"][name],
            }
            for name in engines
        ]
    )
    for label, title in TITLES.items():
        parts += ["", f"## {title}", "", *grid(found[label])]
    return prose + MARK + "\n\n" + "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
