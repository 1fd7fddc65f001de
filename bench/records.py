"""Where the scripts in bench/ put what they measured: one JSON line per comparison in
results/<machine>.jsonl.

A line names the script, the machine, the versions and every raw round, so that a ratio can be
recomputed from it.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from edgemed.artifacts import store
from edgemed.hardware.device import machine

RESULTS = Path(__file__).parent / "results"


def save(script: str, facts: dict[str, Any], file: Path | None = None) -> dict[str, Any]:
    """Append one line to `file` (default: results/<machine>.jsonl) and print it."""
    here = machine()
    line = {
        "script": script,
        **facts,
        "machine": here,
        "versions": store.versions(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    file = file or RESULTS / f"{here['label']}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")
    print(
        json.dumps(
            {key: value for key, value in line.items() if key not in ("machine", "versions")},
            indent=1,
        )
    )
    return line


def spread(values: list[float]) -> dict[str, Any]:
    """min, median, max and the raw rounds."""
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "rounds": values,
    }


def paired_ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios a/b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
