"""Writes the map of the packages in docs/design.md: python docs/make_map.py

What a package is for stands in its `__init__.py`, and the layers in the test that checks them. A
map written by hand would be a third place that is wrong after the next move.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "design.md"
BEGIN = "<!-- written by docs/make_map.py: begin -->"
END = "<!-- written by docs/make_map.py: end -->"
# Plug-in folders have no __init__.py: a file in them is a plug-in, and nothing else.
PLUGINS = {
    "families": "One model architecture a file: its tensor names, config, prompt and image rules.",
    "steps": "One step from checkpoint to checkpoint a file: merge, quantize, distill.",
    "targets": "One runtime a file: what it supports, how an engine is built and opened.",
    "tasks": "One question set a file: rows to examples, prompts, licence.",
    "devices": "One board or machine a file (YAML): memory, bandwidth, power modes.",
}
TOP = {
    "errors": "The one exception a person reads, and how a missing package is named.",
    "params": "Mappings to frozen dataclasses, strictly; ranges and texts stand at the fields.",
    "plugins": "The folder is the registry.",
    "units": "Quantities read from text.",
    "formatting": "Quantities written for a person.",
    "console": "Progress on standard error, results on standard output.",
    "functions": "The functions of `import edgemed` that use an engine, which may stay open.",
    "api": "The functions behind `import edgemed` and the command line.",
}


def layers() -> list[list[str]]:
    """The lines of LAYERS in tests/contract/test_house.py, from bottom to top."""
    source = (ROOT / "tests" / "contract" / "test_house.py").read_text(encoding="utf-8")
    (text,) = re.findall(r'^LAYERS = """\n(.*?)"""', source, re.MULTILINE | re.DOTALL)
    return [line.split() for line in text.strip().splitlines()]


def purpose(name: str) -> str:
    """The first sentence of what a package says about itself."""
    if name in PLUGINS:
        return PLUGINS[name]
    if name in TOP:
        return TOP[name]
    tree = ast.parse((ROOT / "edgemed" / name / "__init__.py").read_text(encoding="utf-8"))
    words = " ".join((ast.get_docstring(tree) or "").split())
    return re.split(r"(?<=\.)\s", words)[0]


def modules(name: str) -> str:
    """The modules of a package, by name."""
    folder = ROOT / "edgemed" / name
    if name in PLUGINS or not folder.is_dir():
        return ""
    files = (f for f in folder.rglob("*.py") if not f.stem.startswith("__"))
    return ", ".join(f"`{f.relative_to(folder).with_suffix('')}`" for f in sorted(files))


def table() -> str:
    """The map: one row a package, from top to bottom; a line between layers is not needed, since
    the first column counts them.
    """
    rows = ["| layer | package | what it is for | modules |", "|--:|---|---|---|"]
    every = layers()
    for level, names in sorted(enumerate(every), reverse=True):
        for name in names:
            if not name.startswith("__"):
                rows.append(f"| {level} | `{name}` | {purpose(name)} | {modules(name)} |")
    return "\n".join(rows)


def page() -> str:
    """docs/design.md with the map of today."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
