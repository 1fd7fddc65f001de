"""How many threads a session may have on this machine.

Runtimes take any number: a hundred thousand end in a crash or in no answer at all.
"""

from __future__ import annotations

import os

from edgemed.errors import EdgemedError

# llama.cpp's own limit is 512 (GGML_MAX_N_THREADS); beyond it the process is aborted.
MOST = 512
# More threads than cores slow every runtime down; a few times as many still answer.
PER_CORE = 4
ALWAYS_ALLOWED = 16


def most_threads() -> int:
    """The most threads a session may have here: four for each logical core, 16 in any case."""
    return min(MOST, max(ALWAYS_ALLOWED, PER_CORE * (os.cpu_count() or 1)))


def check_threads(threads: int | None) -> None:
    """Raises EdgemedError for a number of threads that this machine cannot run; None passes."""
    if threads is None:
        return
    if not 1 <= threads <= most_threads():
        raise EdgemedError(
            f"{threads} threads are not possible on this machine ({os.cpu_count()} logical cores)",
            f"Give 1 to {most_threads()}",
        )
