"""Which tests are too slow for every edit: whole files by name here, single tests by their marker.

What is slow is in the full suite only. `pytest -m "not slow"` leaves it out.
"""

from __future__ import annotations

# Files and folders below tests/, and single tests as file::function.
SLOW = (
    "end_to_end/test_quickstart.py",
    "end_to_end/test_quickstart_vision.py",
)


def is_slow(file: str, function: str) -> bool:
    """Whether a test of a file below tests/ stands in the list, by itself or with its folder."""
    return any(
        file == entry or file.startswith(f"{entry}/") or f"{file}::{function}" == entry
        for entry in SLOW
    )
