"""Times and sizes as people type them: '1s', '800ms', '6GB', '6GiB'.

A plan for 6 MB instead of 6 GB would be wrong without anyone noticing, so a number without its unit
is refused.
"""

from __future__ import annotations

import re

from edgemed.errors import EdgemedError

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


def seconds(text: str, option: str) -> float:
    """'800ms' -> 0.8. Raises EdgemedError for another unit or no number above 0, naming the
    option.
    """
    return _quantity(text, option, SECONDS, "800ms")


def size(text: str, option: str) -> int:
    """'6GB' -> 6000000000, '6GiB' -> 6442450944. Raises EdgemedError as `seconds` does."""
    return round(_quantity(text, option, BYTES, "6GB"))


def _quantity(text: str, option: str, units: dict[str, float], example: str) -> float:
    names = ", ".join(units)
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if not match or not re.fullmatch(r"\d+\.?\d*|\.\d+", match[1]):
        raise EdgemedError(
            f"{option} {text}: not a number with a unit",
            f"For example: {option} {example} (units: {names})",
        )
    unit = next((name for name in units if name.lower() == match[2].lower()), None)
    if unit is None:
        problem = f"'{match[2]}' is not a unit known here" if match[2] else "the unit is missing"
        raise EdgemedError(
            f"{option} {text}: {problem}", f"Units: {names}. For example: {option} {example}"
        )
    value = float(match[1]) * units[unit]
    if value <= 0:
        raise EdgemedError(f"{option} {text}: must be above 0", f"For example: {option} {example}")
    return value
