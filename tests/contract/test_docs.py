"""What documents say about the code is checked here: the map of the packages, links, and names of
files. A page that is wrong is worse than none, because people act on it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def generator(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_map_of_the_packages_is_current() -> None:
    made = generator("make_map").page()
    assert (ROOT / "docs" / "design.md").read_text(encoding="utf-8") == made, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|mailto:|#", target):
            file = (page.parent / target.split("#")[0]).resolve()
            assert file.exists(), f"{target} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """A path of the repository in backticks is one of its files or folders."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    places = r"edgemed|tests|bench|recipes|calibration|docs|LICENSES"
    for name in re.findall(rf"`((?:{places})/[\w./-]+)`", text):
        if "NAME" in name or "MODEL-DEVICE" in name:
            continue
        assert (ROOT / name).exists(), f"{name} is not there"
