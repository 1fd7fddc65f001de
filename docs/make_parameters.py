"""Writes docs/parameters.md from the parameter classes: python docs/make_parameters.py

One table for each step, target and section of a recipe. What a parameter is for, its range and its
default stand at its field in the code; a test compares this page with them.
"""

from __future__ import annotations

from pathlib import Path

from edgemed import plugins
from edgemed.cli.parameters import SECTIONS, Source, step, target

PAGE = Path(__file__).parent / "parameters.md"
HEAD = """# Parameters

Written by `make docs` from the code; a test keeps it current. A parameter is set in a recipe (`quantize: {bits: 8}`), on a recipe's command line (`edgemed run RECIPE --set quantize.bits=8`), or on the command line of a verb (`edgemed quantize MODEL --set damp=0.05`).
An unknown name, a value of another kind or one outside of its range is refused before anything runs.
"""


def table(source: Source) -> list[str]:
    rows = ["| parameter | kind | range | default | what it is for |", "|---|---|---|---|---|"]
    for parameter in source.parameters():
        default = "required" if parameter.default is None else f"`{parameter.default}`"
        doc = parameter.doc.replace("|", "\\|")
        cells = (f"`{parameter.name}`", parameter.kind, parameter.range, default, doc)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def page() -> str:
    chapters = {
        "Steps": {name: step(name) for name in plugins.names("steps")},
        "Targets": {name: target(name) for name in plugins.names("targets")},
        "Sections of a recipe": SECTIONS,
    }
    lines = [HEAD]
    for title, sources in chapters.items():
        lines += [f"## {title}", ""]
        for name, source in sources.items():
            lines += [f"### {name}", "", *table(source), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
