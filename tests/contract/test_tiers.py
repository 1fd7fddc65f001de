"""The list of slow tests names tests that exist: a renamed file would otherwise turn fast."""

from __future__ import annotations

import pytest
from conftest import ROOT
from tiers import SLOW, is_slow


@pytest.mark.parametrize("entry", SLOW)
def test_what_is_listed_exists(entry: str) -> None:
    file, _, function = entry.partition("::")
    path = ROOT / "tests" / file
    assert path.exists()
    assert not function or f"def {function}(" in path.read_text(encoding="utf-8")


def test_folders_files_and_functions_are_found() -> None:
    assert is_slow("parity/moe/test_experts.py", "test_anything")
    assert is_slow("end_to_end/test_quickstart.py", "test_anything")
    assert not is_slow("parity/moelike/test_experts.py", "test_anything")
    file, _, function = next(entry for entry in SLOW if "::" in entry).partition("::")
    assert is_slow(file, function)
    assert not is_slow(file, f"{function}_not")
